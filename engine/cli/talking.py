"""Connects this command's own input, output and terminal to a session with a program in a container."""

import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from limpet.engine.starters.abilities import Session

_BLOCK = 65536
_DETACH = b"\x10\x11"
"""Ctrl-P Ctrl-Q, as docker has it."""


def talk(session: Session, *, has_input: bool, may_detach: bool = False) -> bool:
    """Hand on what comes and goes until nothing more is written; say whether that is so, or the user has detached.

    If the program has a terminal, this one is raw meanwhile, and its size is handed on. Raises EngineGoneError.
    """
    is_raw = session.has_terminal and sys.stdin.isatty()
    detached = threading.Event()
    with _raw() if is_raw else _as_it_is(), _size_of(session) if is_raw else _as_it_is():
        if has_input:
            keys = _DETACH if may_detach and is_raw else b""
            threading.Thread(target=_hand_on, args=(session, keys, detached), daemon=True).start()
        else:
            session.end_input()
        places = {"stderr": sys.stderr.buffer}
        while (chunk := session.read()) is not None:
            place = places.get(chunk.stream, sys.stdout.buffer)
            place.write(chunk.data)
            place.flush()
    return not detached.is_set()


def _hand_on(session: Session, keys: bytes, detached: threading.Event) -> None:
    """Hand on this command's input until its end, or until the keys that detach are pressed."""
    held = b""
    while True:
        try:
            data = os.read(0, _BLOCK)
        except OSError:
            data = b""
        if not data:
            session.end_input()
            return
        if keys:
            data, held = held + data, b""
            before, found, _ = data.partition(keys)
            if found:
                session.write(before)
                detached.set()
                session.hang_up()
                return
            if data.endswith(keys[:1]):
                data, held = data[:-1], data[-1:]
        session.write(data)


def find_size() -> tuple[int, int]:
    """Return rows and columns of this command's terminal, zeros if it has none."""
    try:
        found = os.get_terminal_size(0)
    except OSError:
        return 0, 0
    return found.lines, found.columns


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this command as Ctrl-C does: its session is closed, and its terminal as before."""

    def end(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + number)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    before = {each: handler for each, handler in before.items() if handler is not signal.SIG_IGN}  # as nohup has it
    for each in before:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _raw() -> Iterator[None]:
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSADRAIN)  # what was typed before goes along
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSAFLUSH, before)


@contextmanager
def _size_of(session: Session) -> Iterator[None]:
    """Hand on the size of this terminal, now and whenever it changes."""

    def tell(*_: object) -> None:
        with suppress(OSError):
            session.resize(*find_size())

    before = signal.signal(signal.SIGWINCH, tell)
    tell()
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
