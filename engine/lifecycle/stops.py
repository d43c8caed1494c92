"""Stopping many containers: those of one starter are signalled, and looked at, together."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice

from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.freezing import thaw
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.lifecycle.stopping import find_followers
from limpet.engine.starters.abilities import Plural, by_starter
from limpet.schema.errors import LimpetError, NotFoundError
from limpet.schema.identity import ProcessIdentity
from limpet.schema.signals import number_of_signal
from limpet.schema.status import ContainerState, Status

_AT_ONCE = 100
"""How many are kept from other steps together: those wait."""


def carry_out_stops(runtime: Runtime, containers: Iterable[Container], timeout: float) -> dict[Container, Status]:
    """Do what `carry_out_stop` does, for many; return the status of each for which it is done.

    The others are left for that: somebody is amid a step of theirs, or something is in the way.
    """
    begun: dict[Container, Status] = {}
    for batch in _batches(containers):
        with suppress(LimpetError):
            begun |= runtime.step(partial(_carry_out, runtime, batch, timeout))
    return begun


def _carry_out(runtime: Runtime, containers: Sequence[Container], timeout: float) -> dict[Container, Status]:
    begun: dict[Container, Status] = {}
    with runtime.exclusive_of_many(one.id for one in containers) as mine:
        found: dict[int, dict[Container, Status]] = {}
        for one in containers:
            with suppress(LimpetError):
                status = one.status
                if one.id in mine and status.state is ContainerState.RUNNING and not status.unknown:
                    thaw(one.life)
                    found.setdefault(number_of_signal(one.metadata.stop_signal), {})[one] = status
        for number, group in found.items():
            for starter, identities in _by_starter(runtime, group):
                runtime.watcher.kill_many_at(identities, timeout, starter)
                told = starter.signal_many(identities, number) if timeout else identities
                begun |= {one: status for one, status in group.items() if one.id in told}
    return begun


def finish_stops(runtime: Runtime, begun: Mapping[Container, Status]) -> "list[LimpetError]":
    """Do what `finish_stop` does, for many; return what kept some from it."""
    problems: list[LimpetError] = []

    def finish(container: Container) -> None:
        container.finish_stop(begun[container])

    for batch in _batches(one for one, status in begun.items() if status.state is ContainerState.RUNNING):
        left, asked = batch, set[Container]()
        while left:
            ended = [one for one in left if one not in asked and _has_ended_alone(one)]
            asked.update(ended)
            gone: set[str] = set()
            for starter, identities in _by_starter(runtime, {one: begun[one] for one in ended}):
                gone.update(key for key, number in starter.signal_many(identities, 0).items() if not number)
            left = [one for one in left if one.id not in gone]
            problems += try_each(finish, left[:1])  # meanwhile others end
            del left[:1]
    others = [one for one, status in begun.items() if status.state is not ContainerState.RUNNING]
    return problems + try_each(finish, others)


def try_each(act: Callable[[Container], object], containers: Iterable[Container]) -> "list[LimpetError]":
    """Do it to each container, and return what kept it from some. One that is deleted meanwhile is none of those."""
    problems = []
    for container in containers:
        try:
            act(container)
        except NotFoundError:
            continue
        except LimpetError as error:
            problems.append(error)
    return problems


def _has_ended_alone(container: Container) -> bool:
    """Say whether it has ended, and no policy has made another attempt after it."""
    try:
        return bool(container.status.finished_at) and not find_followers(container.life)
    except LimpetError:
        return False


def _by_starter(
    runtime: Runtime, containers: Mapping[Container, Status]
) -> "list[tuple[Plural, dict[str, ProcessIdentity]]]":
    """Return the processes of those whose starters can do things for many, of each starter."""
    found = []
    for one, status in containers.items():
        with suppress(LimpetError):
            if status.identity is not None:
                found.append((runtime.starter_of(one.id), (one.id, status.identity)))
    return [(starter, dict(identities)) for starter, identities in by_starter(found) if isinstance(starter, Plural)]


def _batches(containers: Iterable[Container]) -> "Iterator[list[Container]]":
    iterator = iter(containers)
    while batch := list(islice(iterator, _AT_ONCE)):
        yield batch
