"""Which Python runs the keeper: this process's own, or another where this process is no ordinary interpreter."""

import os
import shutil
import sys
from collections.abc import Iterator

from limpet.schema.errors import UnsupportedError


def find_interpreter() -> str:
    """Return the path of a Python interpreter of this version or a later one's name.

    An embedded or frozen program (uWSGI, PyInstaller) has itself as `sys.executable`: started again, it would be that
    program. Raises UnsupportedError if there is none.
    """
    for path in _candidates():
        if path and os.path.basename(path).startswith("python") and os.access(path, os.X_OK):
            return path
    raise UnsupportedError(
        f"containers need a Python interpreter, and {sys.executable!r} is none; install python3 where PATH leads"
    )


def _candidates() -> Iterator[str]:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not getattr(sys, "frozen", False):
        yield sys.executable
    yield os.path.join(sys.base_exec_prefix, "bin", name)
    yield shutil.which(name) or ""
    yield shutil.which("python3") or ""
