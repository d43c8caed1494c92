"""What was decided of a container and is still to be done: from what is true of it to the next step, as a table.

It comes after the table in `rules`, which says what is true. Every combination of what is true and what was decided
matches exactly one row, so their order does not matter. An engine asks it after each recovery and after each change,
so that what one engine has decided is finished by whoever comes next. Nothing here looks at the machine or the clock.
"""

from collections.abc import Collection
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from limpet.schema.metadata import Metadata
from limpet.schema.restart import RestartKind, is_used_up, next_delay, parse_restart_policy
from limpet.schema.status import EXIT_CODE_UNKNOWN, ContainerState, Reason, Status


class Standing(StrEnum):
    """What is true of a container."""

    NEW = "new"
    """It has a row; nothing more was acknowledged."""
    CREATED = "created"
    RUNNING = "running"
    FROZEN = "frozen"
    """It runs, and its processes are frozen."""
    SUCCEEDED = "succeeded"
    """It ended with exit code 0."""
    FAILED = "failed"
    """It ended with another exit code, or by a signal."""
    UNSEEN = "ended unseen"
    """It ended, and its exit code was not observed: also by a reboot, or on a person's word."""
    NEVER_RAN = "never ran"
    """It ended before its program was executed."""
    RELEASED = "released"
    UNKNOWN = "unknown"
    """Its state cannot be determined, or its record cannot be read."""


class Attempts(StrEnum):
    """Whether the policy allows one more restart."""

    LEFT = "left"
    USED_UP = "used up"


class Stop(StrEnum):
    """Whether somebody asked for it to be stopped."""

    NONE = "none"
    ASKED = "asked for"


class Expiry(StrEnum):
    """Whether its time is over, or its sandbox's."""

    NONE = "none"
    AHEAD = "ahead"
    OVER = "over"


class Pause(StrEnum):
    """Whether it is to be paused."""

    NONE = "none"
    ASKED = "asked for"


class Place(StrEnum):
    """Which of the attempts of its name it is."""

    LAST = "last"
    FOLLOWED = "followed"
    """The attempt after it is there."""
    OUTDATED = "outdated"
    """Its policy has made the two attempts after it."""


class Maker(StrEnum):
    """Who has made this attempt."""

    PERSON = "person"
    """A program or a person, who starts it, too."""
    POLICY = "policy"
    """The restart policy."""


class Home(StrEnum):
    """Whether its sandbox takes containers."""

    READY = "ready"
    NOT_READY = "not ready"


class Step(StrEnum):
    """What is done next. Each step can be repeated safely."""

    NONE = "none"
    FINISH_STOP = "finish the stop"
    """Thaw it, signal it, and kill what is left of it at the stop's deadline."""
    EXPIRE = "stop"
    """Stop it, with the grace of a stop, because its time is over; hurry a stop that would take longer."""
    RELEASE = "release"
    """Release it, because its time is over."""
    FREEZE = "freeze"
    THAW = "thaw"
    START = "start"
    """Make its bundle and start it."""
    RESTART = "restart"
    """Add the next attempt of its name, once its delay is over."""
    FORGET = "release and delete"


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """What is true of a container, and what was decided."""

    standing: Standing
    policy: RestartKind = RestartKind.NO
    attempts: Attempts = Attempts.LEFT
    stop: Stop = Stop.NONE
    expiry: Expiry = Expiry.NONE
    pause: Pause = Pause.NONE
    place: Place = Place.LAST
    maker: Maker = Maker.PERSON
    home: Home = Home.READY


_ANY_POLICY, _ANY_ATTEMPTS, _ANY_STOP = frozenset(RestartKind), frozenset(Attempts), frozenset(Stop)
_ANY_EXPIRY, _ANY_PAUSE, _ANY_PLACE = frozenset(Expiry), frozenset(Pause), frozenset(Place)
_ANY_MAKER, _ANY_HOME = frozenset(Maker), frozenset(Home)
_ALIVE = frozenset({Standing.RUNNING, Standing.FROZEN})
_WAITING = frozenset({Standing.NEW, Standing.CREATED})
_FAILED = frozenset({Standing.FAILED, Standing.UNSEEN, Standing.NEVER_RAN})
_ENDED = _FAILED | {Standing.SUCCEEDED}
_IN_TIME = frozenset({Expiry.NONE, Expiry.AHEAD})
_OVER = frozenset({Expiry.OVER})
_UNASKED, _ASKED = frozenset({Stop.NONE}), frozenset({Stop.ASKED})
_LAST, _FOLLOWED, _OUTDATED = frozenset({Place.LAST}), frozenset({Place.FOLLOWED}), frozenset({Place.OUTDATED})
_READY, _NOT_READY = frozenset({Home.READY}), frozenset({Home.NOT_READY})
_BY_PERSON, _BY_POLICY = frozenset({Maker.PERSON}), frozenset({Maker.POLICY})
_UNPAUSED, _PAUSED = frozenset({Pause.NONE}), frozenset({Pause.ASKED})
_NO, _ON_FAILURE = frozenset({RestartKind.NO}), frozenset({RestartKind.ON_FAILURE})
_EVER = frozenset({RestartKind.ALWAYS, RestartKind.UNLESS_STOPPED})


class IntentRule(NamedTuple):
    """A row of the table: what it matches, the next step, and why."""

    label: str
    step: Step
    because: str
    standing: Collection[Standing]
    stop: Collection[Stop] = _ANY_STOP
    expiry: Collection[Expiry] = _ANY_EXPIRY
    pause: Collection[Pause] = _ANY_PAUSE
    place: Collection[Place] = _ANY_PLACE
    maker: Collection[Maker] = _ANY_MAKER
    home: Collection[Home] = _ANY_HOME
    policy: Collection[RestartKind] = _ANY_POLICY
    attempts: Collection[Attempts] = _ANY_ATTEMPTS

    def matches(self, intent: Intent) -> bool:
        """Return whether this row matches."""
        return (
            intent.standing in self.standing
            and intent.stop in self.stop
            and intent.expiry in self.expiry
            and intent.pause in self.pause
            and intent.place in self.place
            and intent.maker in self.maker
            and intent.home in self.home
            and intent.policy in self.policy
            and intent.attempts in self.attempts
        )


def _row(label: str, step: Step, because: str, standing: Collection[Standing], **others: Any) -> IntentRule:
    return IntentRule(label, step, because, standing, **others)


_S = Step
_WAITS: dict[str, Any] = {"standing": _WAITING, "expiry": _IN_TIME}
_CALM: dict[str, Any] = {"stop": _UNASKED, "expiry": _IN_TIME}
_AT_END: dict[str, Any] = {"standing": _ENDED, "expiry": _IN_TIME, "place": _LAST}
_CALLED_FOR: dict[str, Any] = {"expiry": _IN_TIME, "place": _LAST, "stop": _UNASKED, "home": _READY}

INTENT_RULES: tuple[IntentRule, ...] = (
    _row("unknown", _S.NONE, "nothing is done to what is not known", {Standing.UNKNOWN}),
    _row("released", _S.NONE, "it was released", {Standing.RELEASED}, place=_LAST | _FOLLOWED),
    _row(
        "outdated",
        _S.FORGET,
        "two newer attempts are there, and the newest that has ended is enough to tell why",
        _ENDED | {Standing.RELEASED},
        place=_OUTDATED,
    ),
    _row("stopping", _S.FINISH_STOP, "it was asked to stop", _ALIVE, stop=_ASKED, expiry=_IN_TIME),
    _row("expired", _S.EXPIRE, "its time is over", _ALIVE, expiry=_OVER),
    _row("pausing", _S.FREEZE, "it is to be paused, and is not yet", {Standing.RUNNING}, pause=_PAUSED, **_CALM),
    _row("resuming", _S.THAW, "it is to run, and is frozen", {Standing.FROZEN}, pause=_UNPAUSED, **_CALM),
    _row("running", _S.NONE, "it runs, as it should", {Standing.RUNNING}, pause=_UNPAUSED, **_CALM),
    _row("paused", _S.NONE, "it is paused, as it should be", {Standing.FROZEN}, pause=_PAUSED, **_CALM),
    _row("expired-unstarted", _S.RELEASE, "its time is over, and it was not started", _WAITING, expiry=_OVER),
    _row("unstarted", _S.NONE, "who has made it starts it", maker=_BY_PERSON, **_WAITS),
    _row("start-stopped", _S.NONE, "it was stopped before it was started", maker=_BY_POLICY, stop=_ASKED, **_WAITS),
    _row(
        "start-followed",
        _S.NONE,
        "another attempt was made after it",
        maker=_BY_POLICY,
        stop=_UNASKED,
        place=_FOLLOWED | _OUTDATED,
        **_WAITS,
    ),
    _row(
        "start-not-ready",
        _S.NONE,
        "its sandbox was stopped",
        maker=_BY_POLICY,
        stop=_UNASKED,
        place=_LAST,
        home=_NOT_READY,
        **_WAITS,
    ),
    _row(
        "start",
        _S.START,
        "its policy has made it, and the engine ended before it was started",
        maker=_BY_POLICY,
        stop=_UNASKED,
        place=_LAST,
        home=_READY,
        **_WAITS,
    ),
    _row(
        "expired-ended",
        _S.RELEASE,
        "its time is over, and it has ended",
        _ENDED,
        expiry=_OVER,
        place=_LAST | _FOLLOWED,
    ),
    _row("followed", _S.NONE, "the next attempt is there", _ENDED, expiry=_IN_TIME, place=_FOLLOWED),
    _row("no-policy", _S.NONE, "it has ended, and is not to be restarted", policy=_NO, **_AT_END),
    _row("stopped", _S.NONE, "no policy undoes a stop", policy=_ANY_POLICY - _NO, stop=_ASKED, **_AT_END),
    _row(
        "not-ready",
        _S.NONE,
        "its sandbox was stopped, and takes no new attempt",
        policy=_ANY_POLICY - _NO,
        stop=_UNASKED,
        home=_NOT_READY,
        **_AT_END,
    ),
    _row("succeeded", _S.NONE, "it ended with exit code 0", {Standing.SUCCEEDED}, policy=_ON_FAILURE, **_CALLED_FOR),
    _row(
        "used-up",
        _S.NONE,
        "its policy allows no more restarts",
        _FAILED,
        policy=_ON_FAILURE,
        attempts={Attempts.USED_UP},
        **_CALLED_FOR,
    ),
    _row(
        "restart-failed",
        _S.RESTART,
        "it failed",
        _FAILED,
        policy=_ON_FAILURE,
        attempts={Attempts.LEFT},
        **_CALLED_FOR,
    ),
    _row("restart", _S.RESTART, "it ended, and was not stopped", _ENDED, policy=_EVER, **_CALLED_FOR),
)


def find_intent_rules(intent: Intent) -> list[IntentRule]:
    """Return the rows that match: always exactly one, which a test proves for every combination."""
    return [rule for rule in INTENT_RULES if rule.matches(intent)]


def decide_step(intent: Intent) -> IntentRule:
    """Return the row that says what is to be done next."""
    (rule,) = find_intent_rules(intent)
    return rule


def find_standing(status: Status, *, is_frozen: bool = False) -> Standing:
    """Return what is true of a container with this status, which was verified."""
    if status.unknown:
        return Standing.UNKNOWN
    if status.released:
        return Standing.RELEASED
    match status.state:
        case ContainerState.EXITED:
            return _find_end(status)
        case ContainerState.RUNNING:
            return Standing.FROZEN if is_frozen else Standing.RUNNING
        case ContainerState.CREATED:
            return Standing.CREATED
    return Standing.NEW


def _find_end(status: Status) -> Standing:
    if status.reason == Reason.START_ERROR:
        return Standing.NEVER_RAN
    if status.exit_code == EXIT_CODE_UNKNOWN and status.reason in _UNSEEN:
        return Standing.UNSEEN
    return Standing.FAILED if status.exit_code else Standing.SUCCEEDED


_UNSEEN = {Reason.UNKNOWN, Reason.REBOOTED, Reason.DECLARED_GONE}


def make_intent(
    metadata: Metadata,
    status: Status,
    *,
    is_frozen: bool = False,
    is_over: bool = False,
    place: Place = Place.LAST,
    is_ready: bool = True,
) -> Intent:
    """Return what is true of a container, and what was decided of it.

    `is_over` says that its time is over, or its sandbox's; `is_ready` that its sandbox takes containers.
    """
    expiry = Expiry.AHEAD if status.expires_at else Expiry.NONE
    return Intent(
        standing=find_standing(status, is_frozen=is_frozen),
        policy=parse_restart_policy(metadata.restart_policy).kind,
        attempts=Attempts.USED_UP if is_used_up(metadata) else Attempts.LEFT,
        stop=Stop.ASKED if status.stop_requested_at else Stop.NONE,
        expiry=Expiry.OVER if is_over else expiry,
        pause=Pause.ASKED if status.paused else Pause.NONE,
        place=place,
        maker=Maker.POLICY if metadata.restart_count else Maker.PERSON,
        home=Home.READY if is_ready else Home.NOT_READY,
    )


def restart_due_at(metadata: Metadata, status: Status) -> int:
    """Return when the next attempt is due of a container that ended, if it is the last and its sandbox is ready.

    Nanoseconds since the epoch; 0 if none is to come.
    """
    if decide_step(make_intent(metadata, status)).step is not Step.RESTART:
        return 0
    return status.finished_at + next_delay(metadata, status)
