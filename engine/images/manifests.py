"""What limpet requires of an image's manifest and configuration, and the form in which it hands images on."""

from typing import NamedTuple

from limpet.engine.images.oci import (
    CONFIG_TYPES,
    LAYER_TYPES,
    Configuration,
    Descriptor,
    Manifest,
    decode,
    require_digest,
)
from limpet.schema.errors import InvalidInputError
from limpet.schema.image import ImageName


class FoundImage(NamedTuple):
    """An image for this machine in a layout: described, but not yet taken in."""

    name: ImageName
    digest: str
    manifest: bytes
    blobs: list[tuple[Descriptor, str]]
    """Its configuration and its layers, each with the file of the layout that holds it."""


def read_manifest(data: bytes) -> Manifest:
    """Read a manifest and require what limpet relies on: layers, all of a kind that it can unpack."""
    manifest = decode(data, Manifest, "an image manifest")
    if manifest.config.media_type not in CONFIG_TYPES:
        raise InvalidInputError(f"a configuration of type {manifest.config.media_type!r} is not that of an image")
    if not manifest.layers:  # to limpet, an image without layers is a built-in one, which uses the host's files
        raise InvalidInputError("an image without layers has nothing to run")
    for layer in manifest.layers:
        if layer.media_type not in LAYER_TYPES:
            raise InvalidInputError(f"layer {layer.digest} is of type {layer.media_type!r}, which is not supported")
    return manifest


def read_configuration(data: bytes, manifest: Manifest) -> Configuration:
    """Read the configuration that belongs to the manifest: with one diff_id for each layer."""
    configuration = decode(data, Configuration, "an image configuration")
    diff_ids = [require_digest(diff_id) for diff_id in configuration.rootfs.diff_ids or []]
    if len(diff_ids) != len(manifest.layers or []):
        raise InvalidInputError(f"{len(manifest.layers or [])} layers, but {len(diff_ids)} diff_ids for them")
    return configuration
