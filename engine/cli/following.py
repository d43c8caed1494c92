"""Prints what a container writes until it has ended; signals that end a program stop the container instead."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from limpet.engine.cli.entries import print_entries
from limpet.engine.cli.hands import Hands
from limpet.engine.cli.output import drop_output, note
from limpet.engine.cli.wording import tell_error
from limpet.engine.control.requests import Began, Done, Stop, Wait
from limpet.engine.logs import read_log
from limpet.schema.errors import LimpetError, NotFoundError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _End:
    """Waits for the container's end on a thread of its own: the main thread prints."""

    def __init__(self, hands: Hands, container_id: str) -> None:
        self._hands = hands
        self._id = container_id
        self._outcome: Done | BaseException | None = None
        self._over = threading.Event()
        self._signals = 0
        threading.Thread(target=self._wait, name="limpet-wait", daemon=True).start()

    def _wait(self) -> None:
        try:
            self._outcome = self._hands.ask(Wait(id=self._id))
        except BaseException as error:  # noqa: BLE001  # it is the main thread's
            self._outcome = error
        self._over.set()

    def is_over(self) -> bool:
        return self._over.is_set()

    def result(self) -> Done:
        self._over.wait()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Have the container stopped; the second time, killed. A signal handler: it must not wait."""
        self._signals += 1
        request = Stop(id=self._id) if self._signals == 1 else Stop(id=self._id, timeout=0)
        threading.Thread(target=self._stop, args=(request,), name="limpet-stop", daemon=True).start()

    def _stop(self, request: Stop) -> None:
        try:
            self._hands.ask(request)
        except LimpetError as error:
            if not self.is_over():
                note(f"limpet: {tell_error(error)}")


def follow_until_end(hands: Hands, began: Began) -> Done:
    """Print its output until it has ended, and return how. An output that takes nothing does not end the waiting."""
    end = _End(hands, began.id)
    with _stopping_by_signals(end):
        if began.log_path:
            # It keeps no log, or whoever reads us has gone: its end is waited for all the same.
            try:
                print_entries(read_log(began.log_top, began.log_path, is_over=end.is_over), at_once=True)
            except NotFoundError:
                pass
            except BrokenPipeError:
                drop_output()
        return end.result()


@contextmanager
def _stopping_by_signals(end: _End) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end.stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
