"""Checks an image's manifest and configuration, and defines the form in which found images are passed on."""

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
    """An image for this machine in a layout, not yet loaded."""

    name: ImageName
    digest: str
    manifest: bytes
    blobs: list[tuple[Descriptor, str]]
    """Its configuration and layers, each with the layout's file that contains it."""


def read_manifest(data: bytes) -> Manifest:
    """Read a manifest and check what limpet relies on: it has layers, all of a type limpet can unpack."""
    manifest = decode(data, Manifest, "an image manifest")
    if manifest.config.media_type not in CONFIG_TYPES:
        raise InvalidInputError(f"configuration type {manifest.config.media_type!r} is not that of an image")
    if not manifest.layers:  # limpet uses images without layers as built-in ones, for the host's files
        raise InvalidInputError("the image has no layers, so it has nothing to run")
    for layer in manifest.layers:
        if layer.media_type not in LAYER_TYPES:
            raise InvalidInputError(f"layer {layer.digest} is of type {layer.media_type!r}, which is not supported")
    return manifest


def read_configuration(data: bytes, manifest: Manifest) -> Configuration:
    """Read the manifest's configuration, and check that it has one diff_id for each layer."""
    configuration = decode(data, Configuration, "an image configuration")
    diff_ids = [require_digest(diff_id) for diff_id in configuration.rootfs.diff_ids or []]
    if len(diff_ids) != len(manifest.layers or []):
        raise InvalidInputError(f"{len(manifest.layers or [])} layers, but {len(diff_ids)} diff_ids")
    return configuration
