"""Telling the host program's log: what its handlers do there ends nothing of ours."""

import logging
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any

Log = logging.LoggerAdapter[logging.Logger]


class _Log(Log):
    """A logger whose handlers, and filters, may raise: that is printed, as `logging` prints its own errors."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            super().log(level, msg, *args, **{**kwargs, "stacklevel": kwargs.get("stacklevel", 1) + 1})
        except BaseException as error:
            if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                raise  # an interrupt; in another thread nothing but such a handler raises one
            if logging.raiseExceptions and sys.stderr is not None:
                with suppress(Exception):
                    traceback.print_exc()


def get_log(name: str) -> Log:
    """Return the logger of this name, to be told from anywhere: amid a change, and by a thread that must go on."""
    return _Log(logging.getLogger(name), {})
