"""Finds the images of an OCI layout: their names, those for this machine, and their blobs.

Sources: image-spec image-layout.md, image-index.md, annotations.md; containerd's annotation for full names.
"""

import io

import msgspec

from limpet.engine.images.docker_archive import find_in_docker_archive
from limpet.engine.images.files import Files, read_document
from limpet.engine.images.manifests import FoundImage, read_configuration, read_manifest
from limpet.engine.images.oci import (
    INDEX_TYPES,
    LAYOUT_VERSION,
    MANIFEST_TYPES,
    Descriptor,
    Index,
    LayoutFile,
    Platform,
    blob_path,
    decode,
    platform_rank,
    this_platform,
)
from limpet.engine.images.streams import HashingReader, require_match
from limpet.schema.errors import InvalidInputError
from limpet.schema.image import ImageName

CONTAINERD_NAME = "io.containerd.image.name"
REFERENCE_NAME = "org.opencontainers.image.ref.name"


def find_images(files: Files, label: str) -> list[FoundImage]:
    """Return the images for this machine; `label` names an image without a name in the layout.

    Raises InvalidInputError if there is no such image, or one is malformed.
    """
    if files.size("oci-layout") is not None:
        return _find_in_layout(files, label)
    if files.size("manifest.json") is not None:
        return find_in_docker_archive(files)
    raise InvalidInputError("it has no file oci-layout, so it is not an OCI image layout")


def _find_in_layout(files: Files, label: str) -> list[FoundImage]:
    version = decode(read_document(files, "oci-layout"), LayoutFile, "oci-layout").image_layout_version
    if version != LAYOUT_VERSION:
        raise InvalidInputError(f"it is an OCI image layout of version {version!r}; limpet reads {LAYOUT_VERSION}")
    offers = _offers(files)
    images = []
    for annotation, leaves in offers.items():
        suited = _suited(leaves)
        if not annotation and len(suited) > 1:
            raise InvalidInputError(f"{len(suited)} images without a name; annotate them with {REFERENCE_NAME}")
        images += [_describe(files, _image_name(annotation, label), leaf) for leaf in suited[:1]]
    if not images:
        there = sorted({str(leaf.platform) for leaves in offers.values() for leaf in leaves})
        raise InvalidInputError(f"it has no image for {this_platform()}, only: {', '.join(there) or 'nothing'}")
    return images


def _offers(files: Files) -> dict[str, list[Descriptor]]:
    """Return the layout's manifests by name. The name is given on the manifest or on the index above it."""
    index = decode(read_document(files, "index.json"), Index, "index.json")
    offers: dict[str, dict[str, Descriptor]] = {}
    for descriptor in index.manifests or []:
        notes = descriptor.annotations or {}
        annotation = notes.get(CONTAINERD_NAME) or notes.get(REFERENCE_NAME) or ""
        leaves = offers.setdefault(annotation, {})
        leaves.update((leaf.digest, leaf) for leaf in _leaves(files, descriptor))
    return {annotation: list(leaves.values()) for annotation, leaves in offers.items()}


def _leaves(files: Files, top: Descriptor) -> list[Descriptor]:
    """Return the manifests below a descriptor, each with its platform."""
    leaves = []
    seen = set()  # indexes can share indexes: without this, a small layout could cause endless work
    pending = [top]
    while pending:
        descriptor = pending.pop()
        if descriptor.digest in seen:
            continue
        seen.add(descriptor.digest)
        if descriptor.media_type in INDEX_TYPES:
            inner = decode(_read_blob(files, descriptor), Index, "an image index").manifests or []
            pending += reversed(inner)
        elif descriptor.media_type in MANIFEST_TYPES:
            leaves.append(descriptor if descriptor.platform else _with_platform(files, descriptor))
        else:
            raise InvalidInputError(f"{descriptor.digest} is of type {descriptor.media_type!r}, not an image")
    return leaves


def _with_platform(files: Files, descriptor: Descriptor) -> Descriptor:
    manifest = read_manifest(_read_blob(files, descriptor))
    configuration = read_configuration(_read_blob(files, manifest.config), manifest)
    return msgspec.structs.replace(descriptor, platform=configuration.platform)


def _suited(leaves: list[Descriptor]) -> list[Descriptor]:
    """Return the manifests for this machine, the best match first."""
    ranked = [(platform_rank(leaf.platform or Platform()), leaf) for leaf in leaves]
    suited = [(rank, leaf) for rank, leaf in ranked if rank is not None]
    return [leaf for _, leaf in sorted(suited, key=lambda pair: pair[0])]


def _describe(files: Files, name: ImageName, descriptor: Descriptor) -> FoundImage:
    data = _read_blob(files, descriptor)
    manifest = read_manifest(data)
    read_configuration(_read_blob(files, manifest.config), manifest)
    blobs = [(blob, blob_path(blob.digest)) for blob in (manifest.config, *(manifest.layers or []))]
    return FoundImage(name, descriptor.digest, data, blobs)


def _read_blob(files: Files, blob: Descriptor) -> bytes:
    data = read_document(files, blob_path(blob.digest))
    reader = HashingReader(io.BytesIO(data), blob.digest)
    reader.drain()
    require_match(blob, reader)
    return data


def _image_name(annotation: str, label: str) -> ImageName:
    """Return the full name. A single word is a tag, as most tools write it; the label is prefixed to it."""
    if not annotation:
        annotation = label
    elif ":" not in annotation and "/" not in annotation:
        annotation = f"{label}:{annotation}"
    name = ImageName.parse(annotation)
    return ImageName(name.repository, name.tag)
