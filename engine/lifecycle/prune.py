"""Removing what has ended: what a prune does, and what it says that it did."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.removal import remove_ended
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.lifecycle.sandbox import Sandbox
from limpet.schema.errors import InvalidStateError, LimpetError, NotFoundError


class Pruned(NamedTuple):
    """What a prune has removed, and what it could not."""

    containers: Sequence[str]
    """The ids of the containers that are gone now."""
    sandboxes: Sequence[str]
    """The ids of the sandboxes that are gone now."""
    problems: Mapping[str, str]
    """By id, why one that was to go is still there."""


def prune(runtime: Runtime, containers: Sequence[Container], sandboxes: Iterable[Sandbox]) -> Pruned:
    """Remove these containers, but for those that are restarted, then those of these sandboxes that have none.

    What cannot be removed stays.
    """
    problems: dict[str, str] = {}
    wanted = [one for one in containers if not _waits_or_is_gone(one)]
    gone = remove_ended(runtime, wanted)
    removed, emptied = [], []
    for container in wanted:
        try:
            if container.id in gone or container.remove():
                removed.append(container.id)
        except LimpetError as error:
            problems[container.id] = str(error)
    for sandbox in sandboxes:
        try:
            if sandbox.delete():
                emptied.append(sandbox.id)
        except LimpetError as error:
            if not (isinstance(error, InvalidStateError) and sandbox.containers()):  # else it is not to go
                problems[sandbox.id] = str(error)
    return Pruned(removed, emptied, problems)


def _waits_or_is_gone(container: Container) -> bool:
    """Say whether it waits for its restart, or was deleted just now, as its policy does with older attempts."""
    try:
        return bool(container.restart_at)
    except NotFoundError:
        return True
