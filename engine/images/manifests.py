"""Checks an image's manifest and configuration, and defines the form in which found images are passed on."""

from collections.abc import Iterable
from typing import NamedTuple

from limpet.engine.images.limits import MAX_LAYERS
from limpet.engine.images.oci import (
    CONFIG_TYPES,
    CONFIGURATION,
    LAYER_TYPES,
    MANIFEST,
    Configuration,
    Descriptor,
    Manifest,
    RunConfig,
    decode,
    require_digest,
)
from limpet.schema.errors import InvalidInputError, quote
from limpet.schema.image import ImageName
from limpet.schema.signals import number_of_signal

_LAYERS = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")
"""How the types of layers begin, those included that limpet does not unpack."""


class FoundImage(NamedTuple):
    """An image for this machine in a layout, not yet loaded."""

    digest: str
    manifest: bytes
    blobs: list[tuple[Descriptor, str]]
    """Its configuration and layers, each once, with the layout's file that contains it."""
    index_digest: str = ""
    """The digest of the index that it was found by, if any."""


def is_image(manifest: Manifest) -> bool:
    """Return whether a manifest is that of an image, rather than of a signature, an SBOM or another artifact.

    Artifacts have a configuration of another type, or blobs that are no layers (manifest.md, "Guidelines for Artifact
    Usage"; cosign's signatures have an image's configuration).
    """
    is_layered = not manifest.layers or any(layer.media_type.startswith(_LAYERS) for layer in manifest.layers)
    return manifest.config.media_type in CONFIG_TYPES and is_layered


def named_after_path(label: str, tag: str = "") -> ImageName:
    """Return the name of an image that has none, or a tag alone. Raises InvalidInputError."""
    try:
        return ImageName.parse(f"{label}:{tag}" if tag else label)
    except InvalidInputError as error:
        reason = f"the image has {'a tag alone' if tag else 'no name'}, so it is named after its directory or archive"
        raise InvalidInputError(f"{error}; {reason}: rename that") from error


def unique_blobs(blobs: Iterable[tuple[Descriptor, str]]) -> list[tuple[Descriptor, str]]:
    """Return each blob once. Raises InvalidInputError if a digest is given two sizes."""
    unique: dict[str, tuple[Descriptor, str]] = {}
    for blob, file_name in blobs:
        first, _ = unique.setdefault(blob.digest, (blob, file_name))
        if first.size != blob.size:
            raise InvalidInputError(
                f"blob {blob.digest} has {first.size} bytes in one place and {blob.size} in another"
            )
    return list(unique.values())


def read_manifest(data: bytes) -> Manifest:
    """Read a manifest and check what limpet relies on: it has layers, all of a type limpet can unpack."""
    manifest = decode(data, MANIFEST, "an image manifest")
    if manifest.config.media_type not in CONFIG_TYPES:
        raise InvalidInputError(f"configuration type {manifest.config.media_type!r} is not that of an image")
    if not manifest.layers:  # limpet uses images without layers as built-in ones, for the host's files
        raise InvalidInputError("the image has no layers, so it has nothing to run")
    if len(manifest.layers) > MAX_LAYERS:
        raise InvalidInputError(f"the image has {len(manifest.layers)} layers; limpet unpacks at most {MAX_LAYERS}")
    for layer in manifest.layers:
        if layer.media_type not in LAYER_TYPES:
            raise InvalidInputError(f"layer {layer.digest} is of type {layer.media_type!r}, which is not supported")
    return manifest


def read_configuration(data: bytes, manifest: Manifest) -> Configuration:
    """Read the manifest's configuration, and check that it has one diff_id for each layer.

    Raises InvalidInputError.
    """
    configuration = decode(data, CONFIGURATION, "an image configuration")
    diff_ids = [require_digest(diff_id) for diff_id in configuration.rootfs.diff_ids or []]
    if len(diff_ids) != len(manifest.layers or []):
        raise InvalidInputError(f"{len(manifest.layers or [])} layers, but {len(diff_ids)} diff_ids")
    return configuration


def require_runnable(configuration: Configuration) -> None:
    """Check what a container would be made of. Raises InvalidInputError for what none can be, whoever runs it."""
    run = configuration.config or RunConfig()
    env = run.env or ()
    fields = {
        "Entrypoint": run.entrypoint or (),
        "Cmd": run.cmd or (),
        "Env": env,
        "User": (run.user or "",),
        "WorkingDir": (run.working_dir or "",),
    }
    for field, texts in fields.items():
        for text in texts:
            if "\0" in text:
                raise InvalidInputError(f"its configuration's {field} has a NUL: {quote(text)}")
    for entry in env:
        if not entry.partition("=")[0]:
            raise InvalidInputError(f"its configuration's Env has a variable without a name: {quote(entry)}")
    if run.working_dir and not run.working_dir.startswith("/"):
        raise InvalidInputError(f"its configuration's WorkingDir is no absolute path: {quote(run.working_dir)}")
    if run.stop_signal:
        number_of_signal(run.stop_signal)
