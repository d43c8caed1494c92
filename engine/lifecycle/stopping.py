"""How a container is stopped: written first, signalled, killed when its time is over, and waited for."""

import os
import signal
import time

from msgspec.structs import replace

from limpet.engine.lifecycle.attempts import cancel_next, find_follower
from limpet.engine.lifecycle.deleted import find_last_status
from limpet.engine.lifecycle.freezing import thaw
from limpet.engine.lifecycle.life import Life
from limpet.engine.lifecycle.patience import Patience, require_seconds
from limpet.engine.state.clock import LATEST, now
from limpet.engine.state.steps import run_whole
from limpet.schema.deadline import DeadlineKind
from limpet.schema.errors import NotFoundError, StoreDamagedError
from limpet.schema.identity import ProcessIdentity
from limpet.schema.restart import RestartKind
from limpet.schema.signals import number_of_signal
from limpet.schema.status import ContainerState, Reason, Status, end

DEFAULT_STOP_TIMEOUT_SECONDS = 10.0


def request_stop(status: Status, timeout: float) -> Status:
    """Return the status with a stop requested: the first request's time stands, and the earliest deadline."""
    asked_at = now()
    deadline = min(asked_at + int(timeout * 1e9), LATEST)
    if status.stop_requested_at:
        deadline = min(deadline, status.stop_deadline)
    return replace(
        status,
        stop_requested_at=status.stop_requested_at or asked_at,
        stop_deadline=deadline,
        paused=False,
        reason=Reason.STOPPING,
        message="it was asked to stop",
    )


def begin_stop(life: Life, timeout: float) -> Status:
    """Do the first half of a stop, and return the status. Raises as `Container.begin_stop` does."""
    require_seconds(timeout)
    runtime = life.runtime
    if runtime.store.is_damaged(life.id):
        return runtime.step(lambda: _end_damaged(life))
    if life.status.unknown:
        runtime.step(lambda: runtime.reexamine(life.id))
    status = runtime.step(lambda: _begin(life, timeout))
    for follower in find_followers(life):
        begin_stop(follower, timeout)
    return status


def carry_out_stop(life: Life, timeout: float) -> Status:
    """Do what is left of `begin_stop` where somebody has just written, by `request_stop`, that it is to stop."""
    return life.runtime.step(lambda: _begin(life, timeout, is_written=True))


def finish_stop(life: Life, status: Status) -> Status:
    """Wait until nothing of it is left, given what `begin_stop` returned, and return the status then."""
    for follower in find_followers(life):
        finish_stop(follower, follower.status)
    patience = be_patient(life, status)
    if patience is None:
        return status
    try:
        life.runtime.wait_for_change(life.id, lambda: life.has_ended, patience.left())
        while not is_stopped(life, status):
            time.sleep(patience.next_pause())
        return life.status
    except NotFoundError:
        return find_last_status(life.runtime.store, life.id, status)


def be_patient(life: Life, status: Status) -> Patience | None:
    """Return how long `finish_stop` is to wait, given what `begin_stop` returned; None if there is nothing to do.

    The watcher sends SIGKILL when the time of the stop is over.
    """
    if status.identity is None or status.state is not ContainerState.RUNNING:
        return None
    grace = (status.stop_deadline - status.stop_requested_at) / 1e9
    return Patience(life.id, status.identity.pid, grace, lambda: _find_doubt(life))


def is_stopped(life: Life, status: Status) -> bool:
    """Say whether its end is written down and nothing of it is left, given what `begin_stop` returned."""
    identity = status.identity
    assert identity is not None
    return life.has_ended and not run_whole(lambda: life.starter.signal(life.id, identity, 0))


def resume_stop(life: Life, status: Status, identity: ProcessIdentity) -> None:
    """Go on with a stop that an engine before this one has begun, with what is left of its time."""
    grace = (status.stop_deadline - status.stop_requested_at) / 1e9  # a clock that was set back lengthens nothing
    thaw(life)
    _send(life, identity, min(grace, _find_grace(life, status)), signals=True)


def needs_stop(life: Life) -> bool:
    """Say whether it runs, or may run, or was restarted. Raises NotFoundError once it is deleted."""
    return life.status.state in {ContainerState.RUNNING, ContainerState.UNKNOWN} or bool(find_followers(life))


def find_followers(life: Life) -> list[Life]:
    """Return the attempt that the policy has made after this one, if there is one."""
    try:
        follower = find_follower(life.runtime.store, life.metadata)
    except (NotFoundError, StoreDamagedError):
        return []
    return [] if follower is None else [Life(life.runtime, follower)]


def expire(life: Life, expires_at: int) -> None:
    """Begin to stop it because its time is over, unless it was renewed since it had this one.

    A stop that was asked for before, and gives it more time, is hurried, also for what one that has ended left.
    """

    def request(old: Status) -> Status:
        if old.expires_at != expires_at:
            return old
        stopping = request_stop(old, DEFAULT_STOP_TIMEOUT_SECONDS)
        return replace(stopping, reason=Reason.EXPIRED, message="its time was over; it was asked to stop")

    with life.exclusive():
        status = life.status
        if status.stop_requested_at:
            _hurry(life, status)
        elif status.state is ContainerState.RUNNING:
            status = life.update_unless_ended(request)
            if status.stop_requested_at and status.identity is not None:
                thaw(life)
                _send(life, status.identity, DEFAULT_STOP_TIMEOUT_SECONDS, signals=True)


def _begin(life: Life, timeout: float, *, is_written: bool = False) -> Status:
    """Write down that it is to stop and until when, then signal; whoever comes next finishes it."""
    with life.exclusive():
        status = life.status
        if status.unknown:
            return _stop_unknown(life, status)
        if status.state is not ContainerState.RUNNING or status.identity is None:
            return _cancel_restart(life, status)
        is_first = is_written or not status.stop_requested_at
        if not is_written:
            status = life.update_unless_ended(lambda old: request_stop(old, timeout))
            if status.finished_at:
                return _cancel_restart(life, status)
        assert status.identity is not None
        left = timeout if is_first else _find_grace(life, status)
        thaw(life)
        _send(life, status.identity, min(timeout, left), signals=is_first)
        return status


def _hurry(life: Life, status: Status) -> None:
    """Leave what is being stopped no more time than a stop has."""
    if _find_grace(life, status) > DEFAULT_STOP_TIMEOUT_SECONDS:
        latest = now() + int(DEFAULT_STOP_TIMEOUT_SECONDS * 1e9)
        status = life.update(lambda old: replace(old, stop_deadline=min(old.stop_deadline, latest)))
    if status.state is ContainerState.RUNNING and status.identity is not None:
        thaw(life)
        _send(life, status.identity, _find_grace(life, status), signals=False)


def _send(life: Life, identity: ProcessIdentity, seconds: float, *, signals: bool) -> None:
    """Have it killed in so many seconds, and send the stop signal if that is to be sent and there is time."""
    starter = life.starter
    life.runtime.watcher.kill_at(life.id, identity, seconds, starter)
    if signals and seconds:
        starter.signal(life.id, identity, number_of_signal(_find_signal(life)))


def _find_signal(life: Life) -> str:
    try:
        return life.metadata.stop_signal
    except StoreDamagedError:  # a container can be stopped whatever became of its record
        return signal.SIGTERM.name


def _find_grace(life: Life, status: Status) -> float:
    """Return how many seconds are left of the time that it has to stop."""
    return life.runtime.store.time_left(DeadlineKind.STOP, life.id, status.stop_deadline) / 1e9


def _find_doubt(life: Life) -> str:
    """Return why it is Unknown, if it is, or why it could not be killed."""
    status = life.status
    if status.unknown:
        return status.message
    why_not = life.runtime.watcher.why_not_killed(life.id)
    return f"it cannot be killed: {why_not}" if why_not else ""


def _cancel_restart(life: Life, status: Status) -> Status:
    """See to it that what does not run is not restarted, or started, by its policy."""
    try:
        metadata = life.metadata
    except StoreDamagedError:  # then no policy is followed
        return status
    if metadata.restart_policy == RestartKind.NO:
        return status
    cancel_next(life.runtime.store, metadata)
    return life.status


def _end_damaged(life: Life) -> Status:
    """End all that the starter knows to be of this container: which process its record named cannot be read."""
    with life.exclusive():
        life.starter.release(life.id)
        return life.status


def _stop_unknown(life: Life, status: Status) -> Status:
    if status.reason == Reason.COPIED:
        raise life.refuse("stop", "nothing was signalled")
    if status.identity is not None:
        try:
            pidfd = life.starter.adopt(life.id, status.identity)
        except NotFoundError as error:
            raise life.refuse("stop", f"{error}; nothing was signalled, and recover() may tell later") from error
        os.close(pidfd)  # it lives after all: the next look will say so
        raise life.refuse(
            "stop", "its process is there; see what kept the look from saying so, recover() and stop it again"
        )
    if not status.created_at:
        raise life.refuse("stop", "it was never created")
    # It holds no process: nothing to signal.
    return life.update(lambda old: end(old, None, finished_at=now(), message=old.message))
