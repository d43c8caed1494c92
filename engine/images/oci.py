"""The documents of an OCI image layout that limpet reads, and this machine's platform.

Sources: image-spec v1.1 (image-layout.md, image-index.md, manifest.md, config.md) and Docker's
"Image Manifest Version 2, Schema 2". Unknown fields are ignored, as the specification demands; where Go
writes null for an empty list, None is read.
"""

import hashlib
import platform
import re
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

import msgspec

from limpet.schema.decoders import Decoder, make_decoder
from limpet.schema.errors import InvalidInputError
from limpet.schema.image import ImageConfig

if TYPE_CHECKING:
    from hashlib import _Hash

LAYOUT_VERSION = "1.0.0"

MAX_DOCUMENT_BYTES = 4 << 20
"""The limit for one JSON document: what registries accept for a manifest."""

INDEX_TYPES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MANIFEST_TYPES = frozenset({MANIFEST_TYPE, "application/vnd.docker.distribution.manifest.v2+json"})
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
CONFIG_TYPES = frozenset({CONFIG_TYPE, "application/vnd.docker.container.image.v1+json"})
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


class Compression(Enum):
    """The compression of a layer, or of a layout's archive."""

    NONE = "tar"
    GZIP = "tar+gzip"
    ZSTD = "tar+zstd"


LAYER_TYPES = {
    LAYER_TYPE: Compression.NONE,
    "application/vnd.oci.image.layer.v1.tar+gzip": Compression.GZIP,
    "application/vnd.oci.image.layer.v1.tar+zstd": Compression.ZSTD,
    "application/vnd.oci.image.layer.nondistributable.v1.tar": Compression.NONE,
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": Compression.GZIP,
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": Compression.ZSTD,
    "application/vnd.docker.image.rootfs.diff.tar": Compression.NONE,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": Compression.GZIP,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": Compression.ZSTD,
    "application/vnd.docker.image.rootfs.foreign.diff.tar": Compression.NONE,
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": Compression.GZIP,
}


class Platform(msgspec.Struct, frozen=True):
    """The machine that an image is for, as Go names it."""

    os: str = ""
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A reference to a blob by its content (descriptor.md)."""

    media_type: str = ""
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] | None = None
    urls: tuple[str, ...] | None = None
    """Where a blob is that may be missing beside the image: of a non-distributable layer."""

    def __post_init__(self) -> None:
        if _algorithm_of(self.digest) in DIGEST_ALGORITHMS:
            require_digest(self.digest)
        if self.size < 0:
            raise ValueError(f"invalid size {self.size}")


class LayoutFile(msgspec.Struct, rename="camel"):
    """The file `oci-layout`, which marks a directory as a layout."""

    image_layout_version: str


class Index(msgspec.Struct, kw_only=True, rename="camel"):
    """A list of manifests, and of further indexes."""

    media_type: str = ""
    manifests: list[Descriptor] | None = None


class Manifest(msgspec.Struct, kw_only=True, rename="camel"):
    """An image: its configuration, and its layers from the lowest up."""

    schema_version: int = 2
    media_type: str = ""
    artifact_type: str = ""
    config: Descriptor
    layers: list[Descriptor] | None = None


class RunConfig(msgspec.Struct, kw_only=True, rename="pascal"):
    """The object `config` of an image configuration."""

    user: str | None = None
    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    working_dir: str | None = None
    stop_signal: str | None = None
    volumes: dict[str, object] | None = None
    labels: dict[str, str] | None = None

    def to_image_config(self) -> ImageConfig:
        """Return it as limpet's type."""
        return ImageConfig(
            user=self.user or "",
            env=self.env or (),
            entrypoint=self.entrypoint or (),
            cmd=self.cmd or (),
            working_dir=self.working_dir or "",
            stop_signal=self.stop_signal or "",
            volumes=tuple(self.volumes or ()),
            labels=self.labels or {},
        )


class RootFs(msgspec.Struct, kw_only=True):
    """What the layers unpack from: the digests of their uncompressed tar files."""

    type: str = "layers"
    diff_ids: list[str] | None = None


class Configuration(msgspec.Struct, kw_only=True):
    """The image configuration (config.md)."""

    os: str = ""
    architecture: str = ""
    variant: str = ""
    created: str | None = None
    config: RunConfig | None = None
    rootfs: RootFs

    @property
    def platform(self) -> Platform:
        """The machine that the image is for."""
        return Platform(self.os, self.architecture, self.variant)

    @property
    def created_at(self) -> int:
        """When the image was built, in nanoseconds since the epoch; 0 if not given."""
        try:
            moment = datetime.fromisoformat(self.created or "")
        except ValueError:
            return 0
        since = moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.fromtimestamp(0, UTC)
        return max(0, (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000)


LAYOUT_FILE, INDEX = make_decoder(LayoutFile), make_decoder(Index)
MANIFEST, CONFIGURATION = make_decoder(Manifest), make_decoder(Configuration)
_Document = TypeVar("_Document")


def decode(data: bytes, decoder: Decoder[_Document], what: str) -> _Document:
    """Read one JSON document. Raises InvalidInputError, naming the expected `what`, if it is not valid."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{what}: {error}; get a good copy of the image") from error


DIGEST_ALGORITHMS = {"sha256": 64, "sha512": 128}
"""The image-spec's algorithms, with their number of hexadecimal digits."""
_DIGEST = re.compile("([a-z0-9]+):([0-9a-f]+)")
_ANY_DIGEST = re.compile("([a-z0-9]+(?:[+._-][a-z0-9]+)*):[a-zA-Z0-9=_-]+")
"""By whichever algorithm (descriptor.md)."""


def is_digest(text: str) -> bool:
    """Return whether a text is a digest by one of these algorithms."""
    match = _DIGEST.fullmatch(text)
    return match is not None and DIGEST_ALGORITHMS.get(match[1]) == len(match[2])


def _algorithm_of(digest: str) -> str:
    """Return the algorithm of a digest, which limpet may not know; one of its own for what is none."""
    match = _ANY_DIGEST.fullmatch(digest)
    return match[1] if match else next(iter(DIGEST_ALGORITHMS))


def require_digest(text: str) -> str:
    """Return `text` if it is a digest, and so a safe file name. Raises InvalidInputError otherwise."""
    if not is_digest(text):
        raise InvalidInputError(f"digest {text[:150]!r}: expected sha256:<64 hex digits> or sha512:<128>")
    return text


def hasher(digest: str) -> "_Hash":
    """Return a new hash of the algorithm in `digest`."""
    return hashlib.new(digest.partition(":")[0], usedforsecurity=False)


def digest_of(data: bytes) -> str:
    """Return the SHA-256 digest of `data` in OCI's form."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def blob_path(digest: str) -> str:
    """Return a blob's path in a layout and in limpet's store: blobs/<algorithm>/<hex>.

    Raises InvalidInputError for a digest by an algorithm that limpet does not know: it may lead anywhere.
    """
    algorithm, _, value = require_digest(digest).partition(":")
    return f"blobs/{algorithm}/{value}"


_MACHINES = {  # uname -m: GOARCH, and the variants that every such machine can run, best first
    "x86_64": ("amd64", ("", "v1")),
    "aarch64": ("arm64", ("", "v8")),
    "armv7l": ("arm", ("v7", "", "v6", "v5")),
    "armv6l": ("arm", ("v6", "", "v5")),
    "i686": ("386", ("",)),
    "ppc64le": ("ppc64le", ("", "power8")),
    "s390x": ("s390x", ("",)),
    "riscv64": ("riscv64", ("",)),
    "loongarch64": ("loong64", ("",)),
}


def this_platform() -> Platform:
    """Return the platform of this machine, without a variant."""
    machine = platform.machine()
    return Platform("linux", _MACHINES.get(machine, (machine, ()))[0])


def platform_rank(wanted: Platform) -> int | None:
    """Return how well a platform matches this machine: 0 is best, None means not at all.

    An architecture may have its other name, as uname(2) and containerd know it: x86_64, aarch64.
    """
    machine = platform.machine()
    architecture, variants = _MACHINES.get(machine, (machine, ("",)))
    named, _ = _MACHINES.get(wanted.architecture, (wanted.architecture, ()))
    if (wanted.os, named) != ("linux", architecture) or wanted.variant not in variants:
        return None
    return variants.index(wanted.variant)
