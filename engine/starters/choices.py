"""What a container's config and its image leave open: stop signal and log file.

For the rest see `users`, `environment` and `limpet.schema.command_line`. Every starter asks here, so that all run the
same.
"""

import os
import signal

from limpet.schema.cri import ContainerConfig
from limpet.schema.cri import Signal as CriSignal
from limpet.schema.errors import InvalidInputError, quote, quote_path
from limpet.schema.image import ImageConfig
from limpet.schema.lengths import require_path_fits, require_same_bytes
from limpet.schema.signals import name_of_signal, number_of_signal

_OF_KERNEL = ("/proc/", "/sys/")
_LONGEST_NAME = 255 - len(".20260101-000000.000001")


def choose_stop_signal(config: ContainerConfig, image: ImageConfig) -> str:
    """Return the stop signal's one name: the config's, else the image's, else SIGTERM. Raises InvalidInputError."""
    name = image.stop_signal or signal.SIGTERM.name
    if config.stop_signal is not CriSignal.RUNTIME_DEFAULT:
        name = config.stop_signal.value
    return name_of_signal(number_of_signal(name))


def choose_log_path(log_directory: str, log_path: str) -> str:
    """Return the absolute path of a container's log, "" if it keeps none.

    Raises InvalidInputError if it would leave the log directory, also through a link in it, if what is no directory is
    on its way, and where nobody can make files.
    """
    if not log_path:
        return ""
    for field, value in (("log_directory", log_directory), ("log_path", log_path)):
        require_same_bytes(field, value)
    if not os.path.isabs(log_directory):
        raise InvalidInputError(f"log_directory {quote_path(log_directory)}: an absolute path is needed")
    root = os.path.realpath(log_directory)
    path = os.path.join(root, log_path)
    # Twice: where links lead in a circle, realpath(3) is given up, and what follows them is left as it is.
    directory = os.path.realpath(os.path.realpath(os.path.dirname(path)))
    name = os.path.basename(path)
    if os.path.isabs(log_path) or name in {"", ".", ".."} or os.path.commonpath([root, directory]) != root:
        raise InvalidInputError(f"log_path {quote_path(log_path)}: a path within the log directory {root} is needed")
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise InvalidInputError(
            f"log_path {quote(log_path)}: its name has more than {_LONGEST_NAME} bytes, which leaves no room for"
            " those of rotated logs"
        )
    if f"{directory}/".startswith(_OF_KERNEL):
        raise InvalidInputError(f"log_directory {quote_path(log_directory)}: the kernel lets nobody make files there")
    above = directory
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        field, value = ("log_directory", log_directory) if len(above) <= len(root) else ("log_path", log_path)
        raise InvalidInputError(f"{field} {quote_path(value)}: {quote_path(above)} is no directory")
    require_path_fits("log_directory", log_directory)
    require_path_fits("log_path", path := os.path.join(directory, name))
    return path
