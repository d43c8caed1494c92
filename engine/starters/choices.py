"""What a container's config and its image leave open: command line, environment, user, stop signal, log file.

The command line follows the rule of the CRI and Kubernetes. Every starter asks here, so that all run the same.
"""

import os
import signal
from collections.abc import Mapping, Sequence

from limpet.schema.cri import ContainerConfig
from limpet.schema.cri import Signal as CriSignal
from limpet.schema.errors import InvalidInputError, quote, quote_path
from limpet.schema.image import ImageConfig
from limpet.schema.protobuf_json import is_utf8
from limpet.schema.runtime_spec import User

_MAX_DIGITS = 10
"""Of a user's or a group's number: 32 bits."""


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


def choose_stop_signal(config: ContainerConfig, image: ImageConfig) -> str:
    """Return the name of the stop signal: the config's, else the image's, else SIGTERM. Raises InvalidInputError."""
    name = image.stop_signal or signal.SIGTERM.name
    if config.stop_signal is not CriSignal.RUNTIME_DEFAULT:
        name = config.stop_signal.value
    text = name.upper()
    if text.isascii() and text.isdigit() and len(text) < 4 and int(text) in set(signal.Signals):
        return signal.Signals(int(text)).name
    full = text if text.startswith("SIG") else f"SIG{text}"
    if full not in signal.Signals.__members__:
        raise InvalidInputError(f"stop signal {quote(name)}: give a signal's name, such as SIGTERM, or its number")
    return full


def choose_log_path(log_directory: str, log_path: str) -> str:
    """Return the absolute path of a container's log, "" if it keeps none.

    Raises InvalidInputError if it would leave the log directory, also through a link in it.
    """
    if not log_path:
        return ""
    if not os.path.isabs(log_directory):
        raise InvalidInputError(f"log_directory {quote_path(log_directory)}: an absolute path is needed")
    root = os.path.realpath(log_directory)
    path = os.path.join(root, log_path)
    directory = os.path.realpath(os.path.dirname(path))
    name = os.path.basename(path)
    if os.path.isabs(log_path) or name in {"", ".", ".."} or os.path.commonpath([root, directory]) != root:
        raise InvalidInputError(f"log_path {quote_path(log_path)}: a path within the log directory {root} is needed")
    return os.path.join(directory, name)


def number_of_signal(name: str) -> int:
    """Return the number of a signal by the name that `choose_stop_signal` gave it."""
    return signal.Signals[name].value
