"""Pausing a container: that it is to be paused is written before it is frozen, so that whoever comes next does that."""

from msgspec.structs import replace

from limpet.engine.lifecycle.life import Life
from limpet.engine.starters.abilities import Freezer
from limpet.schema.errors import UnsupportedError
from limpet.schema.status import ContainerState, Status


def pause(life: Life) -> Status:
    """Freeze all of its processes. Raises as `Container.pause` does."""
    with life.exclusive():
        status = _write(life, "pause", is_wanted=True)
        try:
            _freeze(life, status)
        except BaseException:
            life.update_unless_ended(lambda old: replace(old, paused=False))
            raise
        return status


def resume(life: Life) -> Status:
    """Let its processes go on. Raises as `Container.resume` does."""
    with life.exclusive():
        status = _write(life, "resume", is_wanted=False)
        thaw(life)
        return status


def is_frozen(life: Life) -> bool:
    """Say whether its processes are frozen, whatever is written down."""
    identity, starter = life.status.identity, life.starter
    return identity is not None and isinstance(starter, Freezer) and starter.is_frozen(life.id, identity)


def thaw(life: Life) -> None:
    """Let its processes go on if they are frozen; nothing is written down. Raises UnsupportedError."""
    identity, starter = life.status.identity, life.starter
    if identity is not None and isinstance(starter, Freezer):
        starter.thaw(life.id, identity)


def carry_out_pause(life: Life) -> None:
    """Freeze it or let it go on, as is written down; where it cannot be frozen, write down that it is not."""
    with life.exclusive():
        status = life.status
        if status.state is not ContainerState.RUNNING:
            return
        if not status.paused:
            thaw(life)
            return
        try:
            _freeze(life, status)
        except UnsupportedError as error:
            message = str(error)
            life.update_unless_ended(lambda old: replace(old, paused=False, message=message))


def _write(life: Life, verb: str, *, is_wanted: bool) -> Status:
    """Write down that it is to be paused, or to go on. Raises InvalidStateError, UnsupportedError."""
    status = life.status
    if status.state is not ContainerState.RUNNING or status.identity is None:
        raise life.refuse(verb, "only one that runs can be")
    if status.stop_requested_at:
        raise life.refuse(verb, "it is being stopped")
    _require_freezer(life)
    if status.paused is not is_wanted:
        life.runtime.note_container(life.id)
        status = life.update_unless_ended(lambda old: replace(old, paused=is_wanted))
        if status.finished_at:
            raise life.refuse(verb, "only one that runs can be")
    return status


def _freeze(life: Life, status: Status) -> None:
    starter = _require_freezer(life)
    if status.identity is not None:
        starter.freeze(life.id, status.identity)


def _require_freezer(life: Life) -> Freezer:
    starter = life.starter
    if not isinstance(starter, Freezer):
        raise UnsupportedError(f"container {life.id}: the starter {starter.name!r} cannot freeze anything")
    return starter
