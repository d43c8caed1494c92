"""How a container is given up: what it holds is freed, then it is forgotten."""

from contextlib import suppress

from msgspec.structs import replace

from limpet.engine.lifecycle.attempts import delete_attempt
from limpet.engine.lifecycle.life import Life
from limpet.engine.state.presence import is_there
from limpet.recovery.evidence import Boot, Process
from limpet.recovery.host import observe_boot, observe_process
from limpet.schema.errors import InvalidStateError, LimpetError, StoreDamagedError
from limpet.schema.status import ContainerState, Reason, Status
from limpet.schema.telling import get_log

_log = get_log("limpet.container")


def release(life: Life, *, verb: str = "release", first: str = "stop it first") -> Status:
    """Write down that it is released, and free what it holds. Raises as `Container.release` does.

    An error names the `verb` that was called, and what is to be done `first`.
    """
    with life.exclusive():
        if life.id not in life.runtime.store:
            return Status(released=True)
        status = life.status
        if life.runtime.store.is_damaged(life.id):
            _discard_damaged(life)
            return status
        if status.unknown or status.state is ContainerState.RUNNING:
            raise life.refuse(verb, first)
        if not status.released:
            status = life.update(lambda old: replace(old, released=True))
        _clear(life)
        return status


def release_expired(life: Life, expires_at: int) -> None:
    """Release it because its time is over, unless it was started, or was renewed since it had this one."""

    def note(old: Status) -> Status:
        if old.expires_at != expires_at or old.unknown or old.state is ContainerState.RUNNING:
            return old
        how = ": ".join(filter(None, (old.reason, old.message))) if old.finished_at else "it was not started"
        return replace(old, released=True, reason=Reason.EXPIRED, message=f"its time was over ({how})")

    with life.exclusive():
        if not life.status.released and life.update(note).released:
            release(life)


def delete(life: Life, *, verb: str = "delete") -> bool:
    """Forget it; return False if it is gone already. Raises as `Container.delete` does, naming the `verb`."""
    with life.exclusive():
        store = life.runtime.store
        if life.id not in store:
            return False
        if store.is_damaged(life.id):
            _discard_damaged(life)
            return store.delete(life.id)
        status = life.status
        is_running = status.state is ContainerState.RUNNING
        is_doubtful = status.unknown and status.reason != Reason.BUNDLE_LOST
        if is_doubtful:
            raise life.refuse(verb, "a process of it may be left")
        never_created = not status.created_at and not status.finished_at
        is_settled = status.released or never_created or _has_damaged_metadata(life)
        if is_running or not is_settled:
            raise life.refuse(verb, "stop and release it first")
        # The bundle is the last that a release removes: with it gone, nothing is left.
        if not status.unknown and not (status.released and not is_there(life.bundle.path)):
            _clear(life)
        return _forget(life)


def remove(life: Life) -> bool:
    """Release and delete it; return False if it is gone already. Raises as `Container.remove` does."""
    with life.exclusive():
        if life.id not in life.runtime.store:
            return False
        status = life.status
        if status.created_at or status.finished_at:
            release(life, verb="remove", first="stop it first, or remove it with force")
        return delete(life, verb="remove")


def take_back(life: Life) -> None:
    """Remove it if it is still as it was made: who made it was interrupted, and does not know of it."""
    with suppress(LimpetError), life.exclusive():  # what cannot be removed stays, and is CREATED
        if life.status.state is ContainerState.CREATED:
            life.runtime.step(lambda: remove(life))


def discard(life: Life) -> None:
    """Take back one that could not be made. What cannot be removed now keeps its record, so that a recovery does."""
    try:
        with life.exclusive():
            if life.bundle.holds_ours():
                remove_files(life)
            life.runtime.store.delete(life.id)
    except LimpetError as error:
        _log.warning("container %s could not be made, and stays until it is deleted: %s", life.id, error)


def remove_bundle(life: Life) -> None:
    """Remove what is on disk of it. Raises as `Container.remove_bundle` does."""
    with life.exclusive():
        status = life.status
        if life.runtime.store.is_damaged(life.id) or (status.created_at and not status.released):
            raise life.refuse("remove the bundle of", "stop and release it first")
        _clear(life)


def remove_files(life: Life) -> None:
    """Remove what is on disk of one that its starter has released."""
    life.runtime.store.require_open()
    life.runtime.images.unmount(life.bundle.rootfs)
    life.bundle.remove()


def _clear(life: Life) -> None:
    """End what is left of it, and remove what is on disk."""
    life.starter.release(life.id)
    remove_files(life)


def _forget(life: Life) -> bool:
    life.runtime.forget_container(life.id)
    try:
        metadata = life.metadata
    except StoreDamagedError:
        return life.runtime.store.delete(life.id)
    if metadata.restart_count:
        return delete_attempt(life.runtime.store, metadata)
    return life.runtime.store.delete(life.id)


def _discard_damaged(life: Life) -> None:
    """End what the starter knows to be of a container whose record cannot be read, and remove its bundle if ours.

    Raises InvalidStateError while the process lives that the damaged record names: it may be the container's.
    """
    life.starter.release(life.id)
    suspect = life.runtime.store.find_suspect(life.id)
    is_here = suspect is not None and observe_boot(suspect) is Boot.SAME
    if suspect is not None and is_here and observe_process(suspect)[0] is Process.ALIVE:
        raise InvalidStateError(
            f"container {life.id}: its damaged record names process {suspect.pid}, which lives and may be of it;"
            " find out whose it is, and delete the container once it has ended"
        )
    with suppress(InvalidStateError):  # not ours, or something is mounted in it: recovery judges what is left
        remove_files(life)


def _has_damaged_metadata(life: Life) -> bool:
    try:
        life.runtime.store.metadata(life.id)
    except StoreDamagedError:
        return True
    return False
