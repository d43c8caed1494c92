"""From a container's config and its image to what is run: command line, environment, user, directory.

The command line follows the rule of the CRI and Kubernetes; the result is kept in the bundle's config.json,
in the words of the OCI runtime specification.
"""

from collections.abc import Mapping, Sequence

import msgspec

from limpet.schema.cri import ContainerConfig
from limpet.schema.errors import InvalidInputError, quote
from limpet.schema.image import ImageConfig
from limpet.schema.protobuf_json import is_utf8

OCI_VERSION = "1.2.0"
_MAX_DIGITS = 10
"""Of a user's or a group's number: 32 bits."""


class User(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Who the program runs as, in the container; None for who the engine runs as."""

    uid: int | None = None
    gid: int | None = None
    additional_gids: tuple[int, ...] = ()


class Process(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The OCI `process` object, as far as it is used."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: User = User()


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """The OCI `root` object; an empty path stands for the host's own root."""

    path: str


class BundleConfig(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The content of config.json."""

    process: Process
    root: Root
    oci_version: str = OCI_VERSION


def choose_args(image: ImageConfig, config: ContainerConfig) -> tuple[str, ...]:
    """Return the command line. Raises InvalidInputError if neither the image nor the config gives one.

    config.command | config.args | what runs
    ---------------+-------------+-------------------------------
    not given      | not given   | image.entrypoint + image.cmd
    not given      | given       | image.entrypoint + config.args
    given          | not given   | config.command
    given          | given       | config.command + config.args
    """
    command, args = tuple(config.command), tuple(config.args)
    line = command + args if command else image.entrypoint + (args or image.cmd)
    if not line:
        raise InvalidInputError(
            f"container {config.metadata.name!r}: neither its config nor its image says what to run; give `command`"
        )
    return line


def merge_environment(
    host: Mapping[str, str], image: ImageConfig, config: ContainerConfig, ours: Mapping[str, str]
) -> tuple[str, ...]:
    """Return NAME=value for each variable; the host's first, overridden by the image's, then the config's.

    Variables of the host that are not UTF-8 are left out: config.json cannot hold them. Raises InvalidInputError.
    """
    merged = {name: value for name, value in host.items() if is_utf8(name + value)}
    for entry in image.env:
        name, _, value = entry.partition("=")
        merged[name] = value
    for pair in config.envs:
        if not pair.key or "=" in pair.key or "\0" in pair.key + pair.value:
            raise InvalidInputError(f"environment variable {pair.key!r}: a name without '=' and NUL is needed")
        merged[pair.key] = pair.value
    merged.update(ours)
    return tuple(f"{name}={value}" for name, value in merged.items())


def choose_user(image: ImageConfig, config: ContainerConfig) -> User:
    """Return who the program runs as: the config's security context, else the image's `uid[:gid]`.

    Raises InvalidInputError for a user or group by name: without the image's own tools names are not looked up.
    """
    context = config.linux.security_context if config.linux else None
    if context is not None and context.run_as_username:
        raise InvalidInputError(f"run_as_username {context.run_as_username!r}: give run_as_user, a number")
    groups = tuple(context.supplemental_groups) if context else ()
    if context is not None and context.run_as_user is not None:
        gid = context.run_as_group.value if context.run_as_group else None
        return User(uid=context.run_as_user.value, gid=gid, additional_gids=groups)
    uid, _, gid_text = image.user.partition(":")
    return User(uid=_number(uid), gid=_number(gid_text), additional_gids=groups)


def _number(text: str) -> int | None:
    names: Sequence[str] = ("", "root")
    if text in names:
        return None if not text else 0
    if not text.isascii() or not text.isdigit() or len(text) > _MAX_DIGITS:
        raise InvalidInputError(f"image user {quote(text)}: only numbers and root are understood; set run_as_user")
    return int(text)
