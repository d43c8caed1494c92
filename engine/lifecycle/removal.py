"""Removing many containers that have ended: what is written of them is written in few transactions."""

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress

from msgspec.structs import replace

from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.releasing import remove_files
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.starters.abilities import Plural, by_starter
from limpet.engine.state.presence import is_there
from limpet.recovery.thread import Thread
from limpet.schema.errors import LimpetError, NotFoundError
from limpet.schema.restart import RestartKind
from limpet.schema.status import Status

_AT_ONCE = 100
"""How many share a transaction: other callers of the store wait for it."""


def remove_ended(runtime: Runtime, containers: Iterable[Container]) -> set[str]:
    """Release and delete those that have ended and that no policy restarts; return the ids of those that are gone.

    What cannot be removed is left, for `Container.remove`, which says why. A kill or an interrupt leaves what single
    calls leave: containers that are released, with a bundle or without, and a repetition finishes that.
    """
    ended = [one for one in containers if _has_ended(one)]
    gone: set[str] = set()
    for first in range(0, len(ended), _AT_ONCE):
        with suppress(LimpetError):  # the disk refuses, or a fleet is away: each is tried alone then
            gone |= _remove(runtime, ended[first : first + _AT_ONCE])
    return gone


def _remove(runtime: Runtime, containers: Sequence[Container]) -> set[str]:
    runtime.step(lambda: _mark_released(runtime, containers))
    cleared = runtime.step(lambda: _clear_many(runtime, containers))
    cleared += [one for one in containers if one not in cleared and _clear(one)]
    return runtime.step(lambda: _forget(runtime, cleared))


def _has_ended(container: Container) -> bool:
    try:
        return container.metadata.restart_policy == RestartKind.NO and _is_over(container.status)
    except LimpetError:  # gone, or damaged
        return False


def _is_over(status: Status) -> bool:
    return bool(status.finished_at) and not status.unknown


def _mark_released(runtime: Runtime, containers: Sequence[Container]) -> None:
    with runtime.store.transaction() as draft:
        for container in containers:
            with suppress(NotFoundError):
                status = draft.status(container.id)
                if _is_over(status) and not status.released:
                    draft.replace(container.id, replace(status, released=True))


def _clear_many(runtime: Runtime, containers: Sequence[Container]) -> "list[Container]":
    """Remove the bundles of those of which nothing is left, and that nobody else is amid a step of; return these."""
    free: list[Container] = []
    with runtime.exclusive_of_many(one.id for one in containers) as mine:
        found = []
        for one in containers:
            with suppress(LimpetError):
                if one.id in mine and _is_released(runtime, one):
                    found.append((runtime.starter_of(one.id), one))
        for starter, group in by_starter(found):
            if isinstance(starter, Plural):
                gone = starter.release_many([one.id for one in group])
                free += [one for one in group if one.id in gone]
        return _remove_files(free)


def _remove_files(containers: Sequence[Container]) -> "list[Container]":
    """Remove bundles, two at a time, for each waits for the disk as long as it works; return whose are removed."""
    pending, removed = deque(containers), list[Container]()

    def remove() -> None:
        with suppress(IndexError):  # the other has taken the last
            while True:
                one = pending.popleft()
                with suppress(LimpetError):
                    remove_files(one.life)
                    removed.append(one)

    other = Thread(remove, "limpet-remove")
    with suppress(RuntimeError):  # no thread is to be had
        if len(pending) > 1:
            other.start()
    try:
        remove()
    finally:
        if other.ident is not None:
            other.join()
    return removed


def _is_released(runtime: Runtime, container: Container) -> bool:
    return container.status.released and _is_over(container.status) and not runtime.store.is_damaged(container.id)


def _clear(container: Container) -> bool:
    """Remove the bundle; return False if it, or a process, has to stay."""
    try:
        return container.release().released
    except LimpetError:
        return False


def _forget(runtime: Runtime, containers: Sequence[Container]) -> set[str]:
    gone = set()
    with runtime.store.transaction() as draft:
        for container in containers:
            with suppress(NotFoundError):  # somebody else was faster
                status = draft.status(container.id)
                # The bundle is the last that a release removes: with it gone, nothing is left.
                is_empty = status.released and not is_there(runtime.bundle_path(container.id))
                if is_empty and _is_over(status) and draft.delete(container.id):
                    gone.add(container.id)
    for key in gone:
        runtime.forget_container(key)
    return gone
