"""A thread that begins, or is refused; and one that goes on, whatever befalls it.

`threading.Thread.start()` waits until the thread has begun, without an end. One that has too little memory to begin
never does, and tells nobody.
"""

import _thread
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from limpet.schema.telling import Log

_BEGIN_SECONDS: Final = 5.0
"""How long a thread may take to begin on a machine that has other things to do."""
_PAUSE_SECONDS: Final = 0.05
"""After a failure: what was missing, such as memory, may be there again then."""


class _Started(threading.Event):
    """What `threading.Thread.start()` waits for, in every version of Python so far."""

    def wait(self, timeout: float | None = None) -> bool:
        if super().wait(_BEGIN_SECONDS if timeout is None else timeout) or timeout is not None:
            return self.is_set()
        raise RuntimeError("it does not begin; too little memory?")


class Thread(threading.Thread):
    """A daemon thread."""

    def __init__(self, target: Callable[..., object], name: str, args: tuple[Any, ...] = ()) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self._claim = _thread.allocate_lock()  # of whoever comes first: the thread, or the one who gave it up
        self._started = _Started()

    def start(self) -> None:
        """Start it. Raises RuntimeError if it cannot be started, or does not begin."""
        if sys.is_finalizing():
            raise RuntimeError("the interpreter is ending")
        try:
            super().start()
        except RuntimeError:
            if self._claim.acquire(blocking=False):
                raise
            # It has begun at the last moment.

    def run(self) -> None:
        """Do what it is for, unless it was given up."""
        if self._claim.acquire(blocking=False):
            super().run()


def go_on(
    turn: Callable[[], object], begin_anew: Callable[[], object], is_over: Callable[[], bool], log: Log, who: str
) -> None:
    """Take turn after turn until it is over. What one raises is logged, and ends nothing; nor does a log that fails.

    An allocation may fail at any place of a turn. So `begin_anew` comes before the next one, again until it succeeds:
    it relies on nothing that the turn which failed has half done.
    """
    failure: BaseException | None = None
    while True:
        try:
            if failure is not None:
                time.sleep(_PAUSE_SECONDS)
                _tell(log, who, failure)
            if is_over():
                return
            if failure is not None:
                begin_anew()
                failure = None
            turn()
        except BaseException as error:  # noqa: BLE001  # told before the next turn, once that can be done
            failure = error


def _tell(log: Log, who: str, failure: BaseException) -> None:
    try:
        log.error("%s goes on after an error", who, exc_info=failure)
    except BaseException:  # noqa: BLE001  # no memory, or a handler that ends the program: the turns matter more
        return
