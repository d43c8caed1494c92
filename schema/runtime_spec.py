"""The config.json of a bundle, as far as it is used here: the words are those of the OCI runtime specification.

https://github.com/opencontainers/runtime-spec/blob/main/config.md
"""

import msgspec

OCI_VERSION = "1.2.0"


class User(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Who the program runs as, in the container; None for who the engine runs as."""

    uid: int | None = None
    gid: int | None = None
    additional_gids: tuple[int, ...] = ()


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The `process` object."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: User = User()
    no_new_privileges: bool = False


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """The `root` object; an empty path stands for the host's own root."""

    path: str


class MountSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One of the `mounts`: a file or directory of the host, seen at `destination` in the container."""

    destination: str
    source: str
    type: str = "bind"
    options: tuple[str, ...] = ()
    """rbind, then ro if it cannot be written, then rprivate, rslave or rshared."""


class Spec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The content of config.json."""

    process: ProcessSpec
    root: Root
    hostname: str = ""
    """Empty for the host's own."""
    mounts: tuple[MountSpec, ...] = ()
    oci_version: str = OCI_VERSION
