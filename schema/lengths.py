"""How long the kernel lets a path, an argument or a variable be, and that a path is the same bytes for everybody."""

import os
import resource
import sys

from limpet.schema.errors import InvalidInputError, quote_path

_NAME_BYTES, PATH_BYTES = 255, 4095
"""The most that the kernel takes (NAME_MAX, and PATH_MAX without its end)."""
STRING_BYTES = 32 * resource.getpagesize() - 1
"""The most that one argument or variable may have, without its end (MAX_ARG_STRLEN, execve(2))."""


def require_same_bytes(field: str, path: str) -> None:
    """Raise InvalidInputError, with the field's name, for a path that this Python does not give the system as UTF-8.

    As which all others take it: the keeper, an OCI runtime, and an engine in another locale. Here it would be another
    file, or none.
    """
    try:
        is_same = os.fsencode(path) == path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        is_same = False
    if not is_same:
        raise InvalidInputError(
            f"{field} {quote_path(path)}: this Python's names of files are in {sys.getfilesystemencoding()}, and"
            " limpet's in UTF-8; run it with PYTHONUTF8=1, or in a UTF-8 locale"
        )


def require_path_fits(field: str, path: str, root: str = "") -> None:
    """Raise InvalidInputError, with the field's name, for a path that is longer than the kernel takes below `root`."""
    require_same_bytes(field, path)
    if any(len(os.fsencode(name)) > _NAME_BYTES for name in path.split("/")):
        raise InvalidInputError(f"{field} {quote_path(path)}: a name in it has more than {_NAME_BYTES} bytes")
    most = PATH_BYTES - len(os.fsencode(root))
    if len(os.fsencode(path)) > most:
        raise InvalidInputError(f"{field} {quote_path(path)}: it has more than {most} bytes")


def require_string_fits(what: str, text: str) -> None:
    """Raise InvalidInputError for an argument, or NAME=value, that no program can be given.

    `what` names it; the text itself, which may be a secret, is not shown.
    """
    length = len(text.encode("utf-8", "surrogateescape"))
    if length > STRING_BYTES:
        raise InvalidInputError(f"{what}: it has {length} bytes, and the kernel takes {STRING_BYTES}; use a file")
