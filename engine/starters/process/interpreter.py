"""Which Python runs the keeper: the one that runs this process, or the one that the starter was given."""

import os
import sys

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
