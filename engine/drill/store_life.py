"""A scripted life of a store, for kill points, power cuts and failing disks; and the check of what a crash left.

The life is a list of steps, drawn from a seed, that do the same each time; a step is acknowledged by its number once it
has returned. A model, a plain dictionary, gives the store's content after each step. A crash must leave the content
after the last acknowledged step, or after the one in progress.
"""

import hashlib
import os
import random
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Final

from msgspec.structs import replace

from limpet.engine.database.sqlite import WRITER_PRAGMAS, Pragmas
from limpet.engine.drill.old_database import make_old_database
from limpet.engine.drill.opening import open_store
from limpet.engine.drill.records import RUNNING, SANDBOX, Answer, make_metadata
from limpet.engine.drill.sameness import digest, same_moment
from limpet.engine.lifecycle.bundle import ContainerBundle
from limpet.engine.reconcile import recover
from limpet.engine.state.durable import make_directory, write_file
from limpet.engine.state.names import CONTAINERS, DATABASE
from limpet.engine.store import Request, Store
from limpet.recovery.evidence import Process
from limpet.schema.errors import LimpetError, StoreDamagedError
from limpet.schema.revision import SCHEMA_REVISION
from limpet.testing import Kind, Violation
from limpet.testing.tree import scratch

_BEGINNINGS: Final = ("", "0001", SCHEMA_REVISION)
"""The schema revisions of the databases that lives start with, in turn; none means no database yet."""
Model = dict[str, int]
"""The store's expected content: the pid in each container's status."""
Seen = tuple[Model, dict[str, str]]
"""The result of a look: the store's content, and the rule by which each container was judged."""


@dataclass
class World:
    """The objects that a step works on."""

    directory: str
    pragmas: Pragmas = WRITER_PRAGMAS
    """The settings that its store is opened with."""
    store: Store | None = None

    @property
    def state_dir(self) -> str:
        """The store's state directory."""
        return f"{self.directory}/state"

    @property
    def opened(self) -> Store:
        """The store, opened by an earlier step."""
        assert self.store is not None
        return self.store


def _open(world: World) -> None:
    world.store = open_store(world.state_dir, world.pragmas)


def _close(world: World) -> None:
    world.opened.close()


def _put_database(world: World, revision: str) -> None:
    """Start with an empty database of this schema, as an earlier limpet would have left it."""
    make_directory(world.state_dir)
    write_file(f"{world.state_dir}/{DATABASE}", _make_database(revision))


@cache
def _make_database(revision: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/{DATABASE}"
        make_old_database(path, revision)
        with open(path, "rb") as file:
            return file.read()


def _add_sandbox(world: World) -> None:
    world.opened.add_sandbox(SANDBOX)


def _recover(world: World) -> None:
    recover(world.opened, probe=Answer(Process.ALIVE))


def _end_all(world: World) -> None:
    recover(world.opened, probe=Answer(Process.GONE))


def _nothing(_: Model) -> None:
    """Leave the model unchanged: the step changes nothing in it."""


@dataclass(frozen=True)
class Step:
    """One step of the life, and its effect on the model."""

    act: Callable[[World], object]
    model: Callable[[Model], None] = _nothing
    backup: str = ""
    """The name of the backup that it creates."""


class _Script:
    """Writes a life: steps of many kinds in an order drawn from a seed, each possible at its place."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  # repeatable by its seed
        self._names = list("abcd")
        self._spare = ["e", "f"]
        self._number = 0
        self.steps: list[Step] = []

    def write(self, checkpoints: int, beginning: str) -> None:
        """Write a whole life: every kind of step, including `checkpoints` checkpoints."""
        if beginning:
            self.steps.append(Step(lambda world: _put_database(world, beginning)))
        self.steps += [Step(_open), Step(_add_sandbox), *(_add(name) for name in self._names)]
        kinds = [self._checkpoint] * checkpoints + [
            self._swap,
            self._batch,
            self._delete,
            self._add,
            self._recover,
            self._back_up,
            self._bundle,
            self._reopen,
            self._end_all,
        ]
        self._random.shuffle(kinds)
        for kind in (*kinds, self._recover, self._checkpoint):
            kind()
        self.steps.append(Step(_close))

    def _next(self) -> int:
        self._number += 1
        return self._number + 1

    def _choose(self) -> str:
        return self._random.choice(self._names)

    def _checkpoint(self) -> None:
        name, pid = self._choose(), self._next()
        self.steps.append(
            Step(
                lambda world: world.opened.checkpoint(name, replace(RUNNING, pid=pid)),
                lambda model: model.__setitem__(name, pid),
            )
        )

    def _swap(self) -> None:
        """Change all containers, create one again, and add and delete another, in one transaction."""
        names, renewed, pid = list(self._names), self._choose(), self._next()

        def act(world: World) -> None:
            with world.opened.transaction() as draft:
                for name in names:
                    draft.update(name, lambda old: replace(old, pid=pid))
                draft.delete(renewed)
                draft.add(make_metadata("transient"), RUNNING)
                draft.add(make_metadata(renewed), replace(RUNNING, pid=pid))
                draft.delete("transient")

        self.steps.append(Step(act, lambda model: model.update(dict.fromkeys(names, pid))))

    def _batch(self) -> None:
        """Let changes of all containers find the store busy, so that they share one commit."""
        names, pid = list(self._names), self._next()

        def act(world: World) -> None:
            requests: list[Request] = []

            def submit() -> None:
                for name in names:
                    requests.append(_change(name, pid))
                    world.opened.submit(requests[-1])

            with world.opened.transaction():
                others = threading.Thread(target=submit)
                others.start()
                others.join()
            for request in requests:
                request.wait()
                if request.error is not None:
                    raise request.error

        self.steps.append(Step(act, lambda model: model.update(dict.fromkeys(names, pid))))

    def _delete(self) -> None:
        name = self._names.pop(self._random.randrange(len(self._names)))
        self._spare.append(name)
        self.steps.append(Step(lambda world: world.opened.delete(name), lambda model: model.__delitem__(name)))

    def _add(self) -> None:
        name = self._spare.pop(0)
        self._names.append(name)
        self.steps.append(_add(name))

    def _recover(self) -> None:
        self.steps.append(Step(_recover))

    def _end_all(self) -> None:
        self.steps.append(Step(_end_all, lambda model: model.update(dict.fromkeys(model, 0))))

    def _back_up(self) -> None:
        name = f"backup-{self._next()}.db"
        self.steps.append(Step(lambda world: world.opened.back_up(f"{world.directory}/{name}"), backup=name))

    def _bundle(self) -> None:
        name = self._choose()

        def act(world: World) -> None:
            containers = f"{world.state_dir}/{CONTAINERS}"
            make_directory(containers)
            bundle = ContainerBundle(f"{containers}/{name}", name, world.opened.node)
            bundle.begin()
            bundle.finish(b"{}")
            bundle.remove()

        self.steps.append(Step(act))

    def _reopen(self) -> None:
        self.steps += [Step(_close), Step(_open)]


def _add(name: str) -> Step:
    return Step(lambda world: world.opened.add(make_metadata(name), RUNNING), lambda model: model.__setitem__(name, 1))


def _change(name: str, pid: int) -> Request:
    return Request(lambda draft: draft.replace(name, replace(RUNNING, pid=pid)))


class StoreLife:
    """A store is created, filled, changed, backed up, closed, reopened, recovered.

    `checkpoints` is the length, `seed` determines the order; every third life starts with a database to migrate, and
    every third one without a database.
    """

    pragmas: ClassVar[Pragmas] = WRITER_PRAGMAS
    """The settings that its store is opened with: a broken life has others."""

    def __init__(self, checkpoints: int = 12, *, seed: int = 0) -> None:
        script = _Script(seed)
        script.write(checkpoints, _BEGINNINGS[seed % len(_BEGINNINGS)])
        self._steps = script.steps
        self._models = _models(script.steps)
        self._sound_backups: set[bytes] = set()
        """Digests of backups that were found intact: most images of a life have the same ones."""
        self._seen: dict[tuple[int, bytes], tuple[Seen, Seen]] = {}
        self._seen_again: dict[tuple[int, bytes], Seen] = {}
        """The results of first and second looks, by process and digest: many disks of a life are identical.

        By process, because a recovery that is recorded in its own process must be complete.
        """

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Do every step, and acknowledge each when it has returned."""
        world = World(directory, self.pragmas)
        for number, step in enumerate(self._steps):
            self.perform(step, world)
            acknowledge(b"%d" % number)

    def perform(self, step: Step, world: World) -> None:
        """Do one step."""
        step.act(world)

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Open and recover what is left, twice, and compare with the model. Raises Violation."""
        done = int(acknowledged[-1]) + 1 if acknowledged else 0
        possible = self._models[done : done + 2]
        with same_moment():
            first, second = self._look_twice(f"{directory}/state")
            if first[0] not in possible:
                raise Violation(
                    _kind(first[0], possible),
                    f"after step {done}: {first[0]}, not {possible[0]} (or {possible[-1]})",
                )
            if second != first:
                raise Violation("false_verdict", f"reopened, it reports {second}, not {first}")
            self._check_backups(directory, done)

    def _look_twice(self, state_dir: str) -> tuple[Seen, Seen]:
        key = os.getpid(), digest(state_dir)
        if key not in self._seen:
            first = _look(state_dir)
            left = os.getpid(), digest(state_dir)
            if left not in self._seen_again:
                self._seen_again[left] = _look(state_dir)
            self._seen[key] = first, self._seen_again[left]
        return self._seen[key]

    def _check_backups(self, directory: str, done: int) -> None:
        """Check that each backup exists and is intact: a copy of it opens as a store. May be repeated."""
        found = sorted(os.listdir(directory))
        missing = {step.backup for step in self._steps[:done] if step.backup}.difference(found)
        if missing:
            raise Violation("lost", f"after step {done}: {sorted(missing)} is missing")
        for name in found:
            if name.startswith("backup-"):
                with open(f"{directory}/{name}", "rb") as file:
                    content = file.read()
                key = hashlib.sha256(content).digest()
                if key not in self._sound_backups:
                    _require_whole(name, content)
                    self._sound_backups.add(key)


class FailingDiskLife(StoreLife):
    """The same life on a failing disk: there a store may also refuse to open, if it says what to do."""

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Compare as before; a clear refusal is not a silent wrong answer."""
        try:
            super().check(directory, acknowledged)
        except StoreDamagedError:
            return


def _models(steps: Sequence[Step]) -> list[Model]:
    """Return the store's expected content before the first step, and after each step."""
    models: list[Model] = [{}]
    for step in steps:
        models.append(dict(models[-1]))
        step.model(models[-1])
    return models


def _look(state_dir: str) -> Seen:
    """Open and recover a store; return its content, and the rule by which each container was judged."""
    with Store.open(state_dir) as store:
        records = store.list()
        damaged = [record.id for record in records if store.is_damaged(record.id)]
        if damaged:
            raise Violation("torn", f"damaged records: {damaged}")
        report = recover(store, probe=Answer(Process.ALIVE))
        return {record.id: record.status.pid for record in records}, {
            finding.id: finding.rule for finding in report.findings
        }


def _require_whole(name: str, content: bytes) -> None:
    with scratch() as directory:
        with open(f"{directory}/{DATABASE}", "wb") as file:
            file.write(content)
        try:
            _look(directory)
        except LimpetError as error:
            raise Violation("torn", f"{name}: {error}") from error


def _kind(found: Model, possible: Sequence[Model]) -> Kind:
    whole = {frozenset(model.items()) for model in possible}
    mixed = set().union(*whole)
    return "torn" if set(found.items()) <= mixed and found else "lost"
