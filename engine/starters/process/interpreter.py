"""Which Python runs the keeper: the one that runs this process, or the one that the starter was given.

What an OCI starter runs beside the runtime is short, and needs the standard library alone: any will do.
"""

import os
import shutil
import sys
from contextlib import suppress

from limpet.engine.state.surroundings import may_access
from limpet.schema.errors import UnsupportedError


def require_interpreter(given: str) -> str:
    """Return the path of a Python interpreter: `given`, or this process's own if that is empty.

    An embedded or frozen program (uWSGI, PyInstaller) has itself as `sys.executable`: started again, it would be that
    program, not an interpreter. Raises UnsupportedError then, or if the interpreter is gone.
    """
    path = given or sys.executable or ""
    is_python = os.path.basename(path).startswith("python") and not (getattr(sys, "frozen", False) and not given)
    if not is_python or not may_access(path, os.X_OK):
        raise UnsupportedError(
            f"containers are started by a Python interpreter, and {path!r} is none, or is gone; open the engine with"
            " starter=ProcessStarter(interpreter='/usr/bin/python3')"
        )
    return path


def find_any_interpreter() -> str:
    """Return the path of a Python interpreter: this process's own if it has one, or else the first in PATH.

    Raises UnsupportedError if there is none.
    """
    with suppress(UnsupportedError):
        return require_interpreter("")
    path = shutil.which("python3")
    if path is None:
        raise UnsupportedError(
            f"{sys.executable!r} is no Python interpreter, and there is no python3 in PATH, which sandboxes and"
            " containers of an OCI runtime are made with; on Debian: apt-get install python3-minimal"
        )
    return os.path.abspath(path)
