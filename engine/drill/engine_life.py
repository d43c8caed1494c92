"""A scripted life of an engine with real processes, for true kills; and the check of what a kill left.

Each container goes through its whole life, in an order that a seed mixes. When the engine is killed its containers
are ended, too, before the next engine is opened: so nothing may be said to run, and all that was acknowledged must be
there.
"""

import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from limpet.engine.container import Container
from limpet.engine.directory import CONTAINERS, QUARANTINE, SANDBOXES
from limpet.engine.durable import TEMPORARY_PREFIX
from limpet.engine.engine import Engine
from limpet.engine.testing import Kind, Violation
from limpet.schema.errors import StartError
from limpet.schema.status import ContainerState, Status

_SANDBOX: Final = "jobs"
_COMMANDS: Final = {"brief": ["sh", "-c", "exit 3"], "lasting": ["sleep", "3000"], "wrong": ["/nonexistent"]}
"""What the containers run, by their ids."""


def _start(container: Container) -> None:
    with suppress(StartError):  # of the one whose program is not there
        container.start()


_VERBS: Final[dict[str, Callable[[Container], object]]] = {
    "start": _start,
    "end": lambda container: container.wait(30) if container.id == "brief" else container.stop(30),
    "release": lambda container: container.release(),
    "delete": lambda container: container.delete(),
}
_STAGES: Final = ("create", *_VERBS)
_AFTER: Final[dict[str, Callable[[Status | None], bool]]] = {
    "": lambda status: status is None,
    "creating": lambda status: status is not None and not status.created_at,
    "create": lambda status: status is not None and status.state is ContainerState.CREATED,
    "start": lambda status: status is not None and status.state is ContainerState.EXITED and not status.released,
    "end": lambda status: status is not None and status.state is ContainerState.EXITED and not status.released,
    "release": lambda status: status is not None and status.released,
    "delete": lambda status: status is None,
}
"""What must be said of a container after each stage of its life, once its process is gone."""


class EngineLife:
    """Three containers are made, started, ended, released and deleted; the engine is closed and opened in between."""

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(seed)  # noqa: S311  # repeats by its seed
        waiting = {key: list(_STAGES) for key in _COMMANDS}
        self._steps: list[tuple[str, str]] = [("open", ""), ("sandbox", "")]
        while waiting:
            key = rng.choice(sorted(waiting))
            self._steps.append((waiting[key].pop(0), key))
            if not waiting[key]:
                del waiting[key]
        self._steps.insert(rng.randrange(3, len(self._steps)), ("reopen", ""))
        self._steps.append(("close", ""))

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Do every step, and acknowledge each when it has returned."""
        engine: Engine | None = None
        for number, (verb, key) in enumerate(self._steps):
            if engine is not None and verb in {"reopen", "close"}:
                engine.close()
            if verb in {"open", "reopen"}:
                engine = Engine.open(f"{directory}/state")
            elif engine is not None and verb != "close":
                _perform(engine, verb, key)
            acknowledge(b"%d" % number)

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Open an engine on what is left, twice, and compare. Raises Violation."""
        done = int(acknowledged[-1]) + 1 if acknowledged else 0
        first = _look(f"{directory}/state")
        for key in _COMMANDS:
            expected = [self._stage(key, done), self._stage(key, done + 1)]
            if expected == ["", "create"]:
                expected.append("creating")
            if not any(_AFTER[stage](first.get(key)) for stage in expected):
                said = first.get(key)
                kind: Kind = "false_verdict" if said is not None and said.state is ContainerState.RUNNING else "lost"
                raise Violation(kind, f"after step {done}, {expected[0] or 'nothing'} of {key}: {said}")
        second = _look(f"{directory}/state")
        if second != first:
            raise Violation("false_verdict", f"opened again it says {second}, not {first}")

    def _stage(self, key: str, steps: int) -> str:
        return next((verb for verb, each in reversed(self._steps[:steps]) if each == key), "")


def _perform(engine: Engine, verb: str, key: str) -> None:
    if verb == "sandbox":
        engine.create_sandbox({"metadata": {"name": _SANDBOX}}, id=_SANDBOX)
    elif verb == "create":
        config = {"metadata": {"name": key}, "image": {"image": "host"}, "command": _COMMANDS[key]}
        engine.create_container(config, _SANDBOX, id=key)
    else:
        _VERBS[verb](engine.get(key))


def _look(state_dir: str) -> dict[str, Status]:
    """Open an engine; return what it says. Raises Violation where something lies around that nobody owns."""
    with Engine.open(state_dir) as engine:
        statuses = {record.id: record.status for record in engine.store.list()}
        kept = {key for key, status in statuses.items() if not status.released}
        for folder, owners in ((CONTAINERS, kept), (SANDBOXES, set(engine.store.sandbox_ids))):
            left = set(os.listdir(f"{state_dir}/{folder}")) - owners
            if left:
                raise Violation("other", f"{folder} holds {sorted(left)}, which nobody owns")
    names = [name for name in os.listdir(state_dir) if name.startswith(TEMPORARY_PREFIX) or name == QUARANTINE]
    if names:
        raise Violation("other", f"{names} lie around")
    return statuses
