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


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """The `root` object; an empty path stands for the host's own root."""

    path: str


class Spec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The content of config.json."""

    process: ProcessSpec
    root: Root
    oci_version: str = OCI_VERSION
