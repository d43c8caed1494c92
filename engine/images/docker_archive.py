"""Reads archives written by `docker save` before version 25: manifest.json, configurations and layers, no index.

Source: "Docker Image Specification v1.2", Combined Image JSON + Filesystem Changeset Format. Such an archive
has no OCI manifest; the one created here depends on the image alone, so its digest is always the same.
"""

import msgspec

from limpet.engine.images.files import Files, read_document
from limpet.engine.images.manifests import FoundImage, read_configuration, read_manifest
from limpet.engine.images.oci import (
    CONFIG_TYPE,
    LAYER_TYPES,
    MANIFEST_TYPE,
    Configuration,
    Descriptor,
    Manifest,
    decode,
    digest_of,
    platform_rank,
    this_platform,
)
from limpet.engine.images.streams import HashingReader, sniff
from limpet.schema.errors import InvalidInputError
from limpet.schema.image import ImageName


class _Entry(msgspec.Struct, rename="pascal"):
    """One image in manifest.json."""

    config: str
    repo_tags: list[str] | None
    layers: list[str]


def find_in_docker_archive(files: Files) -> list[FoundImage]:
    """Return the images that manifest.json lists. Raises InvalidInputError."""
    entries = decode(read_document(files, "manifest.json"), list[_Entry], "manifest.json")
    images = [image for entry in entries for image in _describe(files, entry)]
    if not images:
        raise InvalidInputError("manifest.json has no image name; save the image by name, not by id")
    return images


def _describe(files: Files, entry: _Entry) -> list[FoundImage]:
    data = read_document(files, entry.config)
    configuration = decode(data, Configuration, entry.config)
    if platform_rank(configuration.platform) is None:
        raise InvalidInputError(f"{entry.config} is for {configuration.platform}, this machine is {this_platform()}")
    layers = [_layer(files, path) for path in entry.layers]
    config = Descriptor(media_type=CONFIG_TYPE, digest=digest_of(data), size=len(data))
    manifest = msgspec.json.encode(Manifest(media_type=MANIFEST_TYPE, config=config, layers=layers))
    read_configuration(data, read_manifest(manifest))
    blobs = list(zip([config, *layers], [entry.config, *entry.layers], strict=True))
    names = [ImageName.parse(tag) for tag in entry.repo_tags or []]
    return [FoundImage(name, digest_of(manifest), manifest, blobs) for name in names]


def _layer(files: Files, path: str) -> Descriptor:
    with files.open(path) as stream:
        reader = HashingReader(stream, "sha256")
        compression = sniff(reader.read(4))
        reader.drain()
    media_type = next(kind for kind, how in LAYER_TYPES.items() if how is compression)
    return Descriptor(media_type=media_type, digest=reader.digest, size=reader.size)
