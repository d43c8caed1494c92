"""Finds the images of an OCI layout: their names, those for this machine, and their blobs.

Sources: image-spec image-layout.md, image-index.md, annotations.md; containerd's annotation for full names.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress

import msgspec

from limpet.engine.images.docker_archive import find_in_docker_archive
from limpet.engine.images.documents import Documents
from limpet.engine.images.files import Files
from limpet.engine.images.limits import MAX_DESCRIPTORS
from limpet.engine.images.manifests import (
    FoundImage,
    is_image,
    named_after_path,
    read_configuration,
    read_manifest,
    unique_blobs,
)
from limpet.engine.images.oci import (
    CONFIG_TYPES,
    INDEX,
    INDEX_TYPES,
    LAYOUT_FILE,
    LAYOUT_VERSION,
    MANIFEST,
    MANIFEST_TYPES,
    Descriptor,
    Platform,
    blob_path,
    decode,
    is_digest,
    platform_rank,
    this_platform,
)
from limpet.schema.errors import InvalidInputError
from limpet.schema.image import ImageName

CONTAINERD_NAME = "io.containerd.image.name"
_DIRECTORY_TRANSPORT = b"Directory Transport Version"
"""How its file `version` begins."""
REFERENCE_NAME = "org.opencontainers.image.ref.name"


def find_images(files: Files, label: str) -> dict[ImageName, FoundImage]:
    """Return the images for this machine by name; `label` names an image without a name in the layout.

    Signatures, SBOMs and other artifacts beside them are passed over. Raises InvalidInputError if there is no image,
    or one is malformed.
    """
    if files.find("oci-layout") is not None:
        return _find_in_layout(Documents(files), label)
    if _is_directory_transport(files):
        raise InvalidInputError(
            'it is a directory as "dir:" of skopeo writes it, which has no image name; write an OCI image layout'
            " instead: skopeo copy dir:DIRECTORY oci:LAYOUT:NAME"
        )
    if files.find("manifest.json") is not None:
        return find_in_docker_archive(files, label)
    raise InvalidInputError("it has no file oci-layout, so it is not an OCI image layout")


def _is_directory_transport(files: Files) -> bool:
    """Say whether it is what containers/image calls its directory transport: manifest.json beside blobs."""
    with suppress(InvalidInputError), files.open("version") as stream:
        return stream.read(len(_DIRECTORY_TRANSPORT)) == _DIRECTORY_TRANSPORT
    return False


def _find_in_layout(documents: Documents, label: str) -> dict[ImageName, FoundImage]:
    version = decode(documents.read("oci-layout"), LAYOUT_FILE, "oci-layout").image_layout_version
    if version != LAYOUT_VERSION:
        raise InvalidInputError(f"it is an OCI image layout of version {version!r}; limpet reads {LAYOUT_VERSION}")
    tops: dict[str, list[Descriptor]] = {}
    for descriptor in decode(documents.read("index.json"), INDEX, "index.json").manifests or []:
        notes = descriptor.annotations or {}
        tops.setdefault(notes.get(CONTAINERD_NAME) or notes.get(REFERENCE_NAME) or "", []).append(descriptor)
    search = _Search(documents)
    images: dict[ImageName, FoundImage] = {}
    named: dict[ImageName, str] = {}
    for annotation, descriptors in sorted(tops.items(), key=lambda each: _names_by_digest(each[0])):
        suited = search.find(descriptors) if annotation else search.find_each(descriptors)
        if len(suited) > 1:
            raise InvalidInputError(f"{len(suited)} images without a name; annotate them with {REFERENCE_NAME}")
        if not suited or _has_name(annotation, suited[0].digest, named):
            continue
        name = _image_name(annotation, label)
        if named.setdefault(name.normalized, suited[0].digest) != suited[0].digest:
            raise InvalidInputError(f"two of its images have the name {name}; annotate them with {REFERENCE_NAME}")
        images[name] = suited[0]
    if not images:
        raise InvalidInputError(
            f"it has no image for {this_platform()}, only: {', '.join(sorted(search.others)) or 'nothing'}"
        )
    return images


class _Search:
    """Follows descriptors to images. Each document is read once, however many names lead to it."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._left = MAX_DESCRIPTORS
        self._suited: dict[Descriptor, list[tuple[int, Descriptor]]] = {}
        self._indexes: dict[str, list[Descriptor]] = {}
        self._images: dict[str, FoundImage | None] = {}
        self._platforms: dict[str, Platform] = {}
        self.others: set[str] = set()
        """What was found besides images for this machine: platforms and types."""

    def find_each(self, tops: list[Descriptor]) -> list[FoundImage]:
        """Return the image below each of these descriptors that suits this machine best, each image once."""
        found = {image.digest: image for top in reversed(tops) for image in self.find([top])}
        return list(found.values())

    def find(self, tops: list[Descriptor]) -> list[FoundImage]:
        """Return the image below these descriptors that suits this machine best; nothing if there is none."""
        suited: dict[str, tuple[int, Descriptor, Descriptor]] = {}
        for top in tops:
            for rank, leaf in self._below(top):
                suited.setdefault(leaf.digest, (rank, leaf, top))
        for _, leaf, top in sorted(suited.values(), key=lambda each: each[0]):
            image = self._read(leaf)
            if image is not None:
                return [image._replace(index_digest=top.digest if top.media_type in INDEX_TYPES else "")]
        return []

    def _below(self, top: Descriptor) -> list[tuple[int, Descriptor]]:
        """Return the manifests below a descriptor that suit this machine, each with its rank."""
        key = msgspec.structs.replace(top, annotations=None)
        if key not in self._suited:
            self._suited[key] = list(self._walk(key))
        suited = self._suited[key]
        self._count(len(suited))
        return suited

    def _walk(self, top: Descriptor) -> Iterator[tuple[int, Descriptor]]:
        seen = set()  # indexes can share indexes: without this, a small layout could cause endless work
        pending = [top]
        while pending:
            descriptor = pending.pop()
            if descriptor.digest in seen:
                continue
            seen.add(descriptor.digest)
            if descriptor.media_type in INDEX_TYPES:
                inner = self._list(descriptor)
                pending += reversed(inner)
            elif descriptor.media_type in MANIFEST_TYPES:
                rank = self._rank(descriptor)
                if rank is not None:
                    yield rank, descriptor
            else:
                self.others.add(descriptor.media_type or "something without a type")

    def _list(self, index: Descriptor) -> list[Descriptor]:
        if index.digest not in self._indexes:
            document = decode(self._documents.read_blob(index), INDEX, "an image index")
            self._indexes[index.digest] = document.manifests or []
        self._count(len(self._indexes[index.digest]))
        return self._indexes[index.digest]

    def _count(self, descriptors: int) -> None:
        self._left -= descriptors
        if self._left < 0:
            raise InvalidInputError(f"its indexes list more than {MAX_DESCRIPTORS} manifests, limpet's limit")

    def _rank(self, descriptor: Descriptor) -> int | None:
        """Return how well a manifest suits this machine; None if not at all, also for an artifact."""
        platform = descriptor.platform
        if platform is None:
            if self._read(descriptor) is None:
                return None
            platform = self._platforms[descriptor.digest]
        rank = platform_rank(platform)
        if rank is None:
            self.others.add(str(platform) or "an image whose configuration names no platform")
        return rank

    def _read(self, descriptor: Descriptor) -> FoundImage | None:
        """Return a manifest's image; None if it is an artifact."""
        if descriptor.digest not in self._images:
            self._images[descriptor.digest] = self._describe(descriptor)
        return self._images[descriptor.digest]

    def _describe(self, descriptor: Descriptor) -> FoundImage | None:
        data = self._documents.read_blob(descriptor)
        manifest = decode(data, MANIFEST, "an image manifest")
        if not is_image(manifest):
            kind = manifest.artifact_type or manifest.config.media_type
            if kind in CONFIG_TYPES and manifest.layers:
                kind = manifest.layers[0].media_type
            self.others.add(f"an artifact of type {kind!r}")
            return None
        if not manifest.layers:  # as of `umoci new`, to which layers are added under another tag
            self.others.add("an image that has no layers, so it has nothing to run")
            return None
        manifest = read_manifest(data)
        configuration = read_configuration(self._documents.read_blob(manifest.config), manifest)
        self._platforms[descriptor.digest] = configuration.platform
        blobs = [(blob, blob_path(blob.digest)) for blob in (manifest.config, *(manifest.layers or []))]
        return FoundImage(descriptor.digest, data, unique_blobs(blobs))


def _names_by_digest(annotation: str) -> bool:
    """Return whether an image is named by a digest without a tag, as containerd names what has other names as well."""
    name, at, _ = annotation.partition("@")
    return ":" not in name.rpartition("/")[2] if at else is_digest(annotation)


def _has_name(annotation: str, digest: str, named: Mapping[ImageName, str]) -> bool:
    """Return whether an image that is named by a digest has a name of the same repository by which it is found, too."""
    if not _names_by_digest(annotation):
        return False
    names = [name for name, found in named.items() if found == digest]
    repository = ImageName.parse(annotation).normalized.repository
    return any("@" not in annotation or name.repository == repository for name in names)


def _image_name(annotation: str, label: str) -> ImageName:
    """Return the full name. A single word is a tag, as most tools write it; the label is prefixed to it."""
    if is_digest(annotation):
        return named_after_path(label)
    if ":" not in annotation and "/" not in annotation:
        return named_after_path(label, annotation)
    name = ImageName.parse(annotation)
    return ImageName(name.repository, name.tag)
