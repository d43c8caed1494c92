"""The drill's side of the pipes to the process that is killed."""

import os
import select
import sys
import time
from typing import TypeVar

import msgspec

from limpet.engine.drill.messages import AnyCommand, AnyEvent, Event
from limpet.engine.drill.world import Subreaper
from limpet.schema.decoders import Decoder, make_decoder
from limpet.schema.errors import LimpetError

HUNG_SECONDS = 60.0
"""No call of a drill can take longer."""

_Wanted = TypeVar("_Wanted", bound=Event)
_decoder: Decoder[AnyEvent] = make_decoder(AnyEvent)


class EngineEndedError(LimpetError):
    """The engine's process ended, or stopped responding, without being killed."""


class EngineProcess:
    """A process with an engine, from start to end. `kill` and `await_end` close its pipes."""

    def __init__(self, subreaper: Subreaper, state_dir: str, factory: str, log: str) -> None:
        self._subreaper = subreaper
        self._log = log
        self._buffer = bytearray()
        command_read, self._commands = os.pipe2(os.O_CLOEXEC)
        self._events, event_write = os.pipe2(os.O_CLOEXEC)
        errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        module = "limpet.engine.drill.life"
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", module, state_dir, factory],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, source, target)
                for target, source in enumerate((command_read, event_write, errors))
            ],
            setsid=True,  # the terminal's signals are for the drill, which decides when this ends
        )
        for descriptor in (command_read, event_write, errors):
            os.close(descriptor)

    def send(self, command: AnyCommand) -> None:
        """Give a command. Raises EngineEndedError."""
        line = msgspec.json.encode(command) + b"\n"
        try:
            while line:
                line = line[os.write(self._commands, line) :]
        except BrokenPipeError as error:
            raise self._ended("was gone") from error

    def read(self) -> AnyEvent:
        """Return the next event. Raises EngineEndedError, also if none arrives in time."""
        deadline = time.monotonic() + HUNG_SECONDS
        while b"\n" not in self._buffer:
            poll = select.poll()
            poll.register(self._events, select.POLLIN)
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise self._ended(f"did not respond for {HUNG_SECONDS:.0f} s")
            if not self._fill():
                raise self._ended("ended by itself")
        return self._pop()

    def read_until(self, wanted: type[_Wanted]) -> _Wanted:
        """Return the next event, which must be of this kind."""
        event = self.read()
        assert isinstance(event, wanted), event
        return event

    def kill(self) -> list[AnyEvent]:
        """SIGKILL it; return everything it had written. An incomplete line does not count."""
        self._subreaper.kill(self.pid)
        while self._fill():
            pass
        rest = []
        while b"\n" in self._buffer:
            rest.append(self._pop())
        self._close()
        return rest

    def await_end(self) -> None:
        """Wait for it to end by itself, as it was told. Raises EngineEndedError if that takes too long."""
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        if not poll.poll(HUNG_SECONDS * 1000) or self._fill():
            raise self._ended("did not close")
        self._subreaper.await_end(self.pid)
        self._close()

    def _fill(self) -> bool:
        chunk = os.read(self._events, 1 << 16)
        self._buffer += chunk
        return bool(chunk)

    def _pop(self) -> AnyEvent:
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        return _decoder.decode(line)

    def _close(self) -> None:
        os.close(self._commands)
        os.close(self._events)

    def _ended(self, how: str) -> EngineEndedError:
        with open(self._log, encoding="utf-8", errors="replace") as file:
            last = file.read().strip().rpartition("\n")[2]
        return EngineEndedError(f"the engine's process {how}" + (f": {last}" if last else ""))
