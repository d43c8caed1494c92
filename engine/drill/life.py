"""The process that is killed: it opens an engine, follows the plan, and acknowledges each call once it has returned.

Run as `python -m limpet.engine.drill.life STATE_DIRECTORY FACTORY`; FACTORY is `module:name` of a function that opens
an engine on the directory. Commands come on stdin, events go to stdout.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from operator import attrgetter

import msgspec
from msgspec.structs import replace

from limpet.engine.drill.messages import (
    AnyCommand,
    AnyEvent,
    Begun,
    Close,
    Finished,
    Live,
    Opening,
    Recovered,
    Returned,
    Tell,
    Told,
)
from limpet.engine.drill.script import Program, Step, Verb
from limpet.engine.drill.world import VARIABLE
from limpet.engine.engine import Engine
from limpet.engine.state.names import CONTAINERS
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import LimpetError, NotFoundError
from limpet.schema.status import Status

_saying = threading.Lock()


def main() -> None:
    """Open the engine, then follow commands until told to close, or until the drill is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the drill decides when this ends
    state_dir, factory = sys.argv[1:]
    module, _, name = factory.partition(":")
    open_engine: Callable[[str], Engine] = attrgetter(name)(import_module(module))
    say(Opening())
    begun = time.monotonic_ns()
    engine = open_engine(state_dir)
    say(Recovered(time.monotonic_ns() - begun, tell(engine)))
    decoder = make_decoder(AnyCommand)
    for line in sys.stdin.buffer:
        match decoder.decode(line):
            case Live(round):
                programs = {planned.id: planned.program for planned in round.containers}
                walk(engine, programs, round.first)
                lanes = [threading.Thread(target=walk, args=(engine, programs, lane)) for lane in round.lanes]
                for lane in lanes:
                    lane.start()
                for lane in lanes:
                    lane.join()
                say(Finished())
            case Tell():
                say(tell(engine))
            case Close():
                engine.close()
                return
    os._exit(1)  # the drill is gone: exit at once, as if killed


def say(event: AnyEvent) -> None:
    """Write one line. A kill may cut a long line short; the reader sees that by the missing newline."""
    line = msgspec.json.encode(event) + b"\n"
    with _saying:
        while line:
            line = line[os.write(sys.stdout.fileno(), line) :]


def tell(engine: Engine) -> Told:
    """Return everything that the engine reports."""
    containers = {record.id: record.status for record in engine.store.list()}
    return Told(containers, [sandbox.id for sandbox in engine.store.list_sandboxes()])


def walk(engine: Engine, programs: Mapping[str, Program], steps: tuple[Step, ...]) -> None:
    """Do the steps one after the other, with an event before and after each."""
    for step in steps:
        say(Begun(step.number))
        refused = broken = ""
        try:
            CALLS[step.verb](engine, step, programs.get(step.target))
        except LimpetError as error:
            refused = str(error) or type(error).__name__
        except Exception as error:  # noqa: BLE001  # the drill reports any error, with the step
            broken = f"{type(error).__name__}: {error}"
        say(Returned(step.number, _status(engine, step.target), refused, broken))


def _status(engine: Engine, container_id: str) -> Status | None:
    try:
        return engine.store.status(container_id)
    except NotFoundError:
        return None


def _create(engine: Engine, step: Step, program: Program | None) -> None:
    assert program is not None
    config = {
        "metadata": {"name": step.target},
        "image": {"image": "host"},
        "command": list(program.argv),
        "log_path": f"{step.target}.log",
        "envs": [{"key": VARIABLE, "value": os.path.join(os.path.realpath(sys.argv[1]), CONTAINERS, step.target)}],
    }
    engine.create_container(config, step.target.partition("-")[0], id=step.target)


def _transact(engine: Engine, step: Step, _: Program | None) -> None:
    with engine.store.transaction() as draft:
        for member in step.members:
            draft.update(member, lambda status: replace(status, message=str(int(step.value))))


def _drop(engine: Engine, step: Step, _: Program | None) -> None:
    with engine.store.transaction() as draft:
        for member in step.members:
            draft.delete(member)


CALLS: dict[Verb, Callable[[Engine, Step, Program | None], object]] = {
    Verb.SANDBOX: lambda engine, step, _: engine.create_sandbox({"metadata": {"name": step.target}}, id=step.target),
    Verb.CREATE: _create,
    Verb.START: lambda engine, step, _: engine.get(step.target).start(),
    Verb.WAIT: lambda engine, step, _: engine.get(step.target).wait(step.value),
    Verb.STOP: lambda engine, step, _: engine.get(step.target).stop(step.value),
    Verb.RELEASE: lambda engine, step, _: engine.get(step.target).release(),
    Verb.DELETE: lambda engine, step, _: engine.delete(step.target),
    Verb.TRANSACT: _transact,
    Verb.DROP: _drop,
}

if __name__ == "__main__":
    main()
