"""Waits for a container's end, or prints what it writes until then; signals that end a program stop it instead."""

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

from limpet.engine.cli.entries import await_output_of, print_entries
from limpet.engine.cli.hands import Hands
from limpet.engine.cli.output import drop, note
from limpet.engine.cli.wording import tell_error
from limpet.engine.control.requests import Began, Done, Stop, Wait
from limpet.engine.logs import read_log
from limpet.schema.errors import LimpetError, NotFoundError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """Has a container stopped by signals that would end this command, and killed by a second one.

    One that comes while the container is being made is kept until it has begun. Another one then ends the command,
    and leaves the container to whoever makes it.
    """

    def __init__(self, hands: Hands, container_id: str, name: str) -> None:
        self._hands = hands
        self._id = container_id
        self._name = name
        self._before: dict[int, Any] = {}
        self._signals = 0
        self._has_begun = self._is_over = False

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._restore()

    def begin(self) -> None:
        """Tell that the container has begun: from now on it can be stopped."""
        self._has_begun = True
        if self._signals:
            self._stop()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        """See to a signal. It must not wait."""
        self._signals += 1
        if self._has_begun:
            self._stop()
        elif self._signals == 1:
            note(f"limpet: container {self._name} is stopped once it has begun; the next signal ends this command")
        else:
            self._restore()
            raise SystemExit(128 + number)

    def _stop(self) -> None:
        request = Stop(id=self._id) if self._signals == 1 else Stop(id=self._id, timeout=0)
        threading.Thread(target=self._ask, args=(request,), name="limpet-stop", daemon=True).start()

    def _ask(self, request: Stop) -> None:
        try:
            self._hands.ask(request)
        except LimpetError as error:
            if not self._is_over:
                note(f"limpet: {tell_error(error)}")


class _End:
    """Waits for the container's end on a thread of its own: the main thread prints, and takes signals."""

    def __init__(self, hands: Hands, container_id: str) -> None:
        self._hands = hands
        self._id = container_id
        self._outcome: Done | BaseException | None = None
        self._over = threading.Event()
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


def wait_for_end(hands: Hands, began: Began) -> Done:
    """Wait until it has ended, and return how."""
    return _End(hands, began.id).result()


def follow_until_end(hands: Hands, began: Began) -> Done:
    """Print its output until it has ended, and return how. An output that takes nothing does not end the waiting."""
    end = _End(hands, began.id)

    def is_over() -> bool:
        if not end.is_over():
            return False
        await_output_of(hands.state_dir, began.id)
        return True

    if began.log_path:
        # It keeps no log, or whoever reads us has gone: its end is waited for all the same.
        try:
            print_entries(read_log(began.log_top, began.log_path, is_over=is_over), at_once=True)
        except NotFoundError:
            pass
        except BrokenPipeError:
            drop(sys.stdout)
    return end.result()
