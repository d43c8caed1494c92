"""A scripted life of a store, for kill points, power cuts and failing disks; and the check of what a crash left.

The life is a list of steps that do the same each time; a step is acknowledged by its number once it has returned.
A model, a plain dictionary, says what must be in the store after each step. What a crash leaves must be the model
after the last acknowledged step, or after the one that was under way.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from limpet.engine.bundle import ContainerBundle
from limpet.engine.directory import CONTAINERS
from limpet.engine.draft import Draft
from limpet.engine.durable import make_directory
from limpet.engine.recovery_pass import recover
from limpet.engine.store import Store
from limpet.engine.testing import Kind, Violation
from limpet.recovery.evidence import Boot, Observation, Process
from limpet.recovery.probe import Subject
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.errors import LimpetError, StoreDamagedError
from limpet.schema.image import ImageManifest, ImageName
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.status import Status

_RUNNING = Status(created_at=1, started_at=2, pid=1)
_SANDBOX = SandboxMetadata(
    id="s",
    name="s",
    config=parse_pod_sandbox_config({"metadata": {"name": "s", "uid": "u", "namespace": "n"}}),
    created_at=1,
)

Model = dict[str, int]
"""What the store must hold: the pid of each container's status."""


@dataclass
class World:
    """What a step works on, and what the model says of it."""

    directory: str
    model: Model = field(default_factory=dict)
    store: Store | None = None

    @property
    def state_dir(self) -> str:
        """The store's state directory."""
        return f"{self.directory}/state"

    @property
    def opened(self) -> Store:
        """The store, which a step before has opened."""
        assert self.store is not None
        return self.store


class _Answer:
    """A probe that finds every process alive, or every one gone."""

    def __init__(self, seen: Process) -> None:
        self._seen = seen

    def observe(self, container: Subject) -> Observation:  # noqa: ARG002  # it knows without looking
        return Observation(boot=Boot.SAME, process=self._seen)


def _metadata(name: str) -> Metadata:
    config = parse_container_config({"metadata": {"name": name}, "image": {"image": "host"}})
    return Metadata(
        id=name, name=name, sandbox_id="s", config=config, image_manifest=ImageManifest(name=ImageName("host"))
    )


def _open(world: World) -> None:
    world.store = Store.open(world.state_dir)


def _close(world: World) -> None:
    world.opened.close()


def _add_sandbox(world: World) -> None:
    world.opened.add_sandbox(_SANDBOX)


def _add(name: str) -> "Step":
    return Step(lambda world: world.opened.add(_metadata(name), _RUNNING), lambda model: model.__setitem__(name, 1))


def _set(name: str, pid: int) -> "Step":
    return Step(
        lambda world: world.opened.checkpoint(name, replace(_RUNNING, pid=pid)),
        lambda model: model.__setitem__(name, pid),
    )


def _delete(name: str) -> "Step":
    return Step(lambda world: world.opened.delete(name), lambda model: model.__delitem__(name))


def _swap(value: int) -> "Step":
    """Change three containers, delete one and add one, in one transaction."""

    def act(world: World) -> None:
        with world.opened.transaction() as draft:
            for name in "abc":
                _to(draft, name, value)
            draft.delete("d")
            draft.add(_metadata("e"), _RUNNING)
            draft.add(_metadata("d"), replace(_RUNNING, pid=value))
            draft.delete("e")

    def model(held: Model) -> None:
        held.update(dict.fromkeys("abcd", value))

    return Step(act, model)


def _to(draft: Draft, name: str, pid: int) -> None:
    draft.update(name, lambda old: replace(old, pid=pid))


def _recover(world: World) -> None:
    recover(world.opened, probe=_Answer(Process.ALIVE))


def _end_all(world: World) -> None:
    recover(world.opened, probe=_Answer(Process.GONE))


def _bundle(world: World) -> None:
    containers = f"{world.state_dir}/{CONTAINERS}"
    make_directory(containers)
    bundle = ContainerBundle(f"{containers}/a", "a", world.opened.node)
    bundle.begin()
    bundle.finish(b"{}")
    bundle.remove()


def _back_up(number: int) -> "Step":
    return Step(lambda world: world.opened.back_up(f"{world.directory}/backup-{number}.db"))


def _nothing(_: Model) -> None:
    """Leave the model as it is: the step changes nothing that it knows."""


@dataclass(frozen=True)
class Step:
    """One step of the life, and what it does to the model."""

    act: Callable[[World], object]
    model: Callable[[Model], None] = _nothing


def _make_steps(checkpoints: int) -> list[Step]:
    steps = [Step(_open), Step(_add_sandbox), *(_add(name) for name in "abcd")]
    steps += [_set("abcd"[number % 4], number + 2) for number in range(checkpoints)]
    steps += [_swap(500), _delete("c"), _add("c"), Step(_recover), _back_up(1), Step(_bundle), Step(_close)]
    steps += [
        Step(_open),
        Step(_recover),
        *(_set("ab"[number % 2], number + 600) for number in range(checkpoints // 2)),
    ]
    steps += [
        _swap(700),
        Step(_end_all, lambda model: model.update(dict.fromkeys(model, 0))),
        _back_up(2),
        Step(_close),
    ]
    return steps


class StoreLife:
    """A store is made, filled, changed, backed up, closed, opened again, recovered. `checkpoints` is the length."""

    def __init__(self, checkpoints: int = 12) -> None:
        self._steps = _make_steps(checkpoints)

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Do every step, and acknowledge each when it has returned."""
        world = World(directory)
        for number, step in enumerate(self._steps):
            step.act(world)
            acknowledge(b"%d" % number)

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Open what is left, twice, and compare with the model. Raises Violation."""
        done = int(acknowledged[-1]) + 1 if acknowledged else 0
        possible = list(self._models(done))
        first = _look(f"{directory}/state")
        if first not in possible:
            raise Violation(
                _kind(first, possible), f"after step {done}: {first}, not {possible[0]} (or {possible[-1]})"
            )
        second = _look(f"{directory}/state")
        if second != first:
            raise Violation("false_verdict", f"opened again it says {second}, not {first}")
        _check_leftovers(directory)

    def _models(self, done: int) -> Iterator[Model]:
        """Yield what the store may hold after `done` steps: their model, and that with the next step."""
        model: Model = {}
        for step in self._steps[:done]:
            step.model(model)
        yield dict(model)
        for step in self._steps[done : done + 1]:
            step.model(model)
            yield dict(model)


class FailingDiskLife(StoreLife):
    """The same life on a disk that fails: there a store may also refuse to open, if it says what to do."""

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Compare as before; a clear refusal is no silent wrong answer."""
        try:
            super().check(directory, acknowledged)
        except StoreDamagedError:
            return


def _look(state_dir: str) -> Model:
    with Store.open(state_dir) as store:
        damaged = [record.id for record in store.list() if store.is_damaged(record.id)]
        if damaged:
            raise Violation("torn", f"damaged records: {damaged}")
        return {record.id: record.status.pid for record in store.list()}


def _kind(found: Model, possible: Sequence[Model]) -> Kind:
    whole = {frozenset(model.items()) for model in possible}
    mixed = set().union(*whole)
    return "torn" if set(found.items()) <= mixed and found else "lost"


def _check_leftovers(directory: str) -> None:
    """See that a backup is whole, and opens as a store. May be repeated, as a check that was itself cut short is."""
    for name in sorted(os.listdir(directory)):
        if name.startswith("backup-"):
            place = f"{directory}/opened-{name}"
            os.makedirs(place, 0o700, exist_ok=True)
            os.rename(f"{directory}/{name}", f"{place}/store.db")
    for name in sorted(os.listdir(directory)):
        if name.startswith("opened-") and os.path.exists(f"{directory}/{name}/store.db"):
            try:
                _look(f"{directory}/{name}")
            except LimpetError as error:
                raise Violation("torn", f"{name}: {error}") from error
