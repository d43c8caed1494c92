"""What a container's config and its image leave open: command line, stop signal, log file.

For the rest see `users` and `environment`.

The command line follows the rule of the CRI and Kubernetes. Every starter asks here, so that all run the same.
"""

import os
import signal

from limpet.engine.starters.signals import name_of_signal, number_of_signal
from limpet.schema.cri import ContainerConfig
from limpet.schema.cri import Signal as CriSignal
from limpet.schema.errors import InvalidInputError, quote_path
from limpet.schema.image import ImageConfig


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


def choose_stop_signal(config: ContainerConfig, image: ImageConfig) -> str:
    """Return the stop signal's one name: the config's, else the image's, else SIGTERM. Raises InvalidInputError."""
    name = image.stop_signal or signal.SIGTERM.name
    if config.stop_signal is not CriSignal.RUNTIME_DEFAULT:
        name = config.stop_signal.value
    return name_of_signal(number_of_signal(name))


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
