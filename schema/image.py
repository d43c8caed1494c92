"""Images as containers use them: a name, a manifest, a mount type."""

from enum import StrEnum
from typing import Self

import msgspec
from msgspec.structs import replace

from limpet.schema.any_text import plain
from limpet.schema.errors import InvalidInputError, quote

DEFAULT_TAG = "latest"
_DEFAULT_REGISTRY = "docker.io"
_DEFAULT_REGISTRY_BEFORE = "index.docker.io"
_OFFICIAL = "library"
_MAX_CHARACTERS = 1024
"""The limit for an image name: registries accept 255 for a repository, 128 for a tag, and a digest has up to 135."""


class MountType(StrEnum):
    """How an image becomes a root file system."""

    PLAIN = "plain"
    """Every layer is unpacked into one directory."""


class ImageName(msgspec.Struct, frozen=True):
    """`repository[:tag][@digest]`, as people write it. Two names mean one image if `normalized` is equal."""

    repository: str
    tag: str = DEFAULT_TAG
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `repository[:tag][@algorithm:hex]`. Raises InvalidInputError if it is empty or malformed."""
        name, at, digest = plain(text).partition("@")
        head, colon, tag = name.rpartition(":")
        if not colon or "/" in tag:  # the colon belongs to a port (host:5000/app), not a tag
            head, tag = name, ""
        malformed = not head or (colon and head != name and not tag) or (at and ":" not in digest)
        if malformed or len(text) > _MAX_CHARACTERS:
            raise InvalidInputError(f"image name {quote(text)}: expected repository[:tag][@algorithm:hex]")
        if any(c.isspace() or not c.isprintable() for c in text):
            raise InvalidInputError(f"image name {quote(text)}: no spaces or control characters are allowed")
        return cls(head, tag or DEFAULT_TAG, digest)

    @staticmethod
    def of(name: object) -> "ImageName":
        """Return a name as it is, or read it if it is text. Raises InvalidInputError for anything else."""
        if isinstance(name, str):
            return ImageName.parse(name)
        if not isinstance(name, ImageName):
            raise InvalidInputError(f"image name: give an ImageName or text, not {type(name).__name__}")
        return name

    @property
    def normalized(self) -> "ImageName":
        """The full name: busybox is docker.io/library/busybox:latest (github.com/distribution/reference)."""
        registry, slash, path = self.repository.partition("/")
        if not slash or not (set(".:") & set(registry) or registry == "localhost" or registry != registry.lower()):
            registry, path = _DEFAULT_REGISTRY, self.repository
        elif registry == _DEFAULT_REGISTRY_BEFORE:
            registry = _DEFAULT_REGISTRY
        if registry == _DEFAULT_REGISTRY and "/" not in path:
            path = f"{_OFFICIAL}/{path}"
        return ImageName(f"{registry}/{path}", self.tag, self.digest)

    def __str__(self) -> str:
        return f"{self.repository}:{self.tag}" + (f"@{self.digest}" if self.digest else "")


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """How an image's program runs: the `config` object of an OCI image configuration."""

    user: str = ""
    env: tuple[str, ...] = ()
    """Each is NAME=value."""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    """Directories that the program counts on, whether a layer has them or not."""
    labels: dict[str, str] = {}


class ImageManifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a container records of its image: enough to run it again without the image store."""

    name: ImageName
    digest: str = ""
    """The OCI image manifest's digest; empty for a built-in image."""
    config: ImageConfig = ImageConfig()
    layers: tuple[str, ...] = ()
    """The layers' digests, lowest first; none for a built-in image, which uses the host's own files."""

    @property
    def exact_name(self) -> ImageName:
        """Its name with its digest, which stands for this very image, whoever else has the name by now."""
        return replace(self.name, digest=self.digest)

    @property
    def is_builtin(self) -> bool:
        """True for an image without layers, whose programs are the host's own binaries."""
        return not self.layers
