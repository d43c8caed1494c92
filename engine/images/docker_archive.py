"""Reads archives written by `docker save` before version 25: manifest.json, configurations and layers, no index.

Source: "Docker Image Specification v1.2", Combined Image JSON + Filesystem Changeset Format. Such an archive
has no OCI manifest; the one created here depends on the image alone, so its digest is always the same.
"""

from collections.abc import Hashable

import msgspec

from limpet.engine.images.documents import Documents
from limpet.engine.images.files import Files
from limpet.engine.images.manifests import FoundImage, named_after_path, read_configuration, read_manifest, unique_blobs
from limpet.engine.images.oci import (
    CONFIG_TYPE,
    CONFIGURATION,
    LAYER_TYPES,
    MANIFEST_TYPE,
    Descriptor,
    Manifest,
    Platform,
    decode,
    digest_of,
    platform_rank,
    this_platform,
)
from limpet.engine.images.streams import SNIFFED_BYTES, HashingReader, sniff
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import InvalidInputError
from limpet.schema.image import ImageName


class _Entry(msgspec.Struct, kw_only=True, rename="pascal"):
    """One image in manifest.json."""

    config: str
    repo_tags: list[str] | None = None
    layers: list[str]


_entries = make_decoder(list[_Entry])


def find_in_docker_archive(files: Files, label: str) -> dict[ImageName, FoundImage]:
    """Return the images that manifest.json lists, by name; `label` names one without a name.

    Raises InvalidInputError.
    """
    documents = Documents(files)
    entries = decode(documents.read("manifest.json"), _entries, "manifest.json")
    if not entries:
        raise InvalidInputError("manifest.json lists no image; get a good copy")
    if len(entries) > 1 and not all(entry.repo_tags for entry in entries):
        raise InvalidInputError("manifest.json has an image without a name beside another; save the images by name")
    layers = _Layers(files)
    images = {}
    for entry in entries:
        image = _describe(documents, layers, entry)
        names = [ImageName.parse(tag) for tag in entry.repo_tags or []] or [named_after_path(label)]
        images.update(dict.fromkeys(names, image))
    return images


def _describe(documents: Documents, known: "_Layers", entry: _Entry) -> FoundImage:
    data = documents.read(entry.config)
    configuration = decode(data, CONFIGURATION, entry.config)
    is_named = configuration.platform != Platform()  # else it is as old as images without one
    if is_named and platform_rank(configuration.platform) is None:
        raise InvalidInputError(f"{entry.config} is for {configuration.platform}, this machine is {this_platform()}")
    layers = [known.describe(path) for path in entry.layers]
    config = Descriptor(media_type=CONFIG_TYPE, digest=digest_of(data), size=len(data))
    manifest = msgspec.json.encode(Manifest(media_type=MANIFEST_TYPE, config=config, layers=layers))
    read_configuration(data, read_manifest(manifest))
    blobs = unique_blobs(zip([config, *layers], [entry.config, *entry.layers], strict=True))
    return FoundImage(digest_of(manifest), manifest, blobs)


class _Layers:
    """The archive's layers. Images share them under many names, and each is read from its beginning to its end."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._known: dict[Hashable, Descriptor] = {}

    def describe(self, path: str) -> Descriptor:
        """Return a layer's digest, size and type. Raises InvalidInputError if it is missing."""
        place = self._files.find(path)
        if place not in self._known:
            self._known[place] = self._read(path)
        return self._known[place]

    def _read(self, path: str) -> Descriptor:
        with self._files.open(path) as stream:
            reader = HashingReader(stream, "sha256")
            compression = sniff(reader.read(SNIFFED_BYTES))
            reader.drain()
        media_type = next(kind for kind, how in LAYER_TYPES.items() if how is compression)
        return Descriptor(media_type=media_type, digest=reader.digest, size=reader.size)
