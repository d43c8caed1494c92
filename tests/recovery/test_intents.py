"""The table of what is to be done next is total and free of overlap, and keeps the promises."""

from itertools import product

import pytest

from limpet.recovery import RULES, Evidence
from limpet.recovery.intents import (
    INTENT_RULES,
    Attempts,
    Expiry,
    Home,
    Intent,
    Maker,
    Pause,
    Place,
    Standing,
    Step,
    Stop,
    decide_step,
    find_intent_rules,
    find_standing,
    make_intent,
    restart_due_at,
)
from limpet.schema import ContainerState, ImageManifest, ImageName, Metadata, Status
from limpet.schema.cri import parse_container_config
from limpet.schema.errors import InvalidInputError
from limpet.schema.restart import RestartKind, RestartPolicy, is_used_up, next_delay, parse_restart_policy
from limpet.schema.status import Reason
from tests.recovery.test_rules import EVERY_EVIDENCE, STATUSES, verdict_on

EVERY_INTENT = [
    Intent(
        standing=standing,
        policy=policy,
        attempts=attempts,
        stop=stop,
        expiry=expiry,
        pause=pause,
        place=place,
        maker=maker,
        home=home,
    )
    for standing, policy, attempts, stop, expiry, pause, place, maker, home in product(
        Standing, RestartKind, Attempts, Stop, Expiry, Pause, Place, Maker, Home
    )
]
ALIVE = {Standing.RUNNING, Standing.FROZEN}
ENDED = {Standing.SUCCEEDED, Standing.FAILED, Standing.UNSEEN, Standing.NEVER_RAN}


def metadata(policy: str = "no", count: int = 0, delay: int = 0) -> Metadata:
    return Metadata(
        id="one",
        name="one",
        sandbox_id="pod",
        config=parse_container_config({"metadata": {"name": "one"}, "image": {"image": "host"}}),
        image_manifest=ImageManifest(name=ImageName("host")),
        restart_policy=policy,
        restart_count=count,
        restart_delay=delay,
    )


@pytest.mark.parametrize(
    ("reason", "code", "standing"),
    [
        (Reason.COMPLETED, 0, Standing.SUCCEEDED),
        (Reason.ERROR, 7, Standing.FAILED),
        (Reason.ERROR, 128, Standing.FAILED),
        (Reason.ERROR, 255, Standing.FAILED),
        (Reason.OOM_KILLED, 137, Standing.FAILED),
        (Reason.START_ERROR, 128, Standing.NEVER_RAN),
        (Reason.UNKNOWN, 255, Standing.UNSEEN),
        (Reason.REBOOTED, 255, Standing.UNSEEN),
        (Reason.DECLARED_GONE, 255, Standing.UNSEEN),
    ],
)
def test_how_it_ended_is_told_by_reason_and_code(reason: Reason, code: int, standing: Standing) -> None:
    """A program may end with 128 or 255 itself: that is a failure, neither a start that failed nor an unseen end."""
    status = Status(created_at=1, started_at=2, finished_at=3, exit_code=code, reason=reason)
    assert find_standing(status) is standing


def test_every_intent_meets_exactly_one_rule_and_none_is_dead() -> None:
    """Whatever is true and was decided, one rule answers, and only one; each answers something."""
    found = [find_intent_rules(intent) for intent in EVERY_INTENT]
    wrong = [
        (intent, [rule.label for rule in rules])
        for intent, rules in zip(EVERY_INTENT, found, strict=True)
        if len(rules) != 1
    ]
    assert not wrong, wrong[:3]
    assert {rules[0].label for rules in found} == {rule.label for rule in INTENT_RULES}
    assert len({rule.label for rule in INTENT_RULES}) == len(INTENT_RULES)


def test_no_policy_undoes_a_stop() -> None:
    """What somebody asked to be stopped is never started again."""
    for intent in EVERY_INTENT:
        if intent.stop is Stop.ASKED:
            assert decide_step(intent).step not in {Step.START, Step.RESTART}, intent


def test_a_restart_needs_an_end_a_policy_a_place_and_a_home() -> None:
    """Only the last attempt that has ended, of a policy that asks for it, in a ready sandbox, in time."""
    for intent in EVERY_INTENT:
        if decide_step(intent).step is Step.RESTART:
            assert intent.standing in ENDED
            assert intent.policy is not RestartKind.NO
            assert (intent.place, intent.home) == (Place.LAST, Home.READY)
            assert intent.expiry is not Expiry.OVER
            if intent.policy is RestartKind.ON_FAILURE:
                assert intent.standing is not Standing.SUCCEEDED
                assert intent.attempts is Attempts.LEFT


def test_a_policy_that_asks_for_a_restart_gets_it() -> None:
    """Nothing but a stop, another attempt, the sandbox or the time keeps it from one."""
    for intent in EVERY_INTENT:
        is_free = (intent.stop, intent.place, intent.home) == (Stop.NONE, Place.LAST, Home.READY)
        if not is_free or intent.expiry is Expiry.OVER or intent.standing not in ENDED:
            continue
        match intent.policy:
            case RestartKind.NO:
                wanted = False
            case RestartKind.ON_FAILURE:
                wanted = intent.standing is not Standing.SUCCEEDED and intent.attempts is Attempts.LEFT
            case _:
                wanted = True
        assert (decide_step(intent).step is Step.RESTART) is wanted, intent


def test_always_and_unless_stopped_differ_in_nothing() -> None:
    """Nobody's stop is undone, so that the two mean the same."""
    for intent in EVERY_INTENT:
        if intent.policy is RestartKind.ALWAYS:
            other = Intent(
                **{name: getattr(intent, name) for name in Intent.__struct_fields__ if name != "policy"},
                policy=RestartKind.UNLESS_STOPPED,
            )
            assert decide_step(other) is decide_step(intent)


def test_only_what_is_over_is_ended_for_its_time() -> None:
    """Nothing is stopped or released whose time is not over; what is over holds nothing for long."""
    for intent in EVERY_INTENT:
        step = decide_step(intent).step
        if step in {Step.EXPIRE, Step.RELEASE}:
            assert intent.expiry is Expiry.OVER
        if intent.expiry is Expiry.OVER and intent.standing is not Standing.UNKNOWN:
            ends = {Step.EXPIRE, Step.RELEASE, Step.FINISH_STOP, Step.FORGET}
            assert step in ends or intent.standing is Standing.RELEASED, intent


def test_nothing_is_done_to_what_is_unknown() -> None:
    """Whatever was decided waits until somebody knows what is true."""
    for intent in EVERY_INTENT:
        if intent.standing is Standing.UNKNOWN:
            assert decide_step(intent).step is Step.NONE


def test_only_what_lives_is_stopped_frozen_or_thawed() -> None:
    """A step fits what is true, and each of freeze and thaw is done only where it is not done yet."""
    for intent in EVERY_INTENT:
        step = decide_step(intent).step
        if step in {Step.FINISH_STOP, Step.EXPIRE, Step.FREEZE, Step.THAW}:
            assert intent.standing in ALIVE
        if step is Step.FREEZE:
            assert (intent.standing, intent.pause) == (Standing.RUNNING, Pause.ASKED)
        if step is Step.THAW:
            assert (intent.standing, intent.pause) == (Standing.FROZEN, Pause.NONE)
        if step is Step.FORGET:
            assert intent.place is Place.OUTDATED
            assert intent.standing not in ALIVE


def test_the_table_fits_behind_every_verdict() -> None:
    """Each evidence has one verdict, and each verdict with each decision has one step; Unknown has none."""
    reached = set()
    labels = set()
    for evidence in EVERY_EVIDENCE:
        verdict = verdict_on(evidence)
        labels.add(verdict.rule)
        standing = find_standing(verdict.status)
        reached.add(standing)
        assert (standing is Standing.UNKNOWN) is verdict.status.unknown, evidence
        if verdict.status.state is ContainerState.RUNNING:
            assert standing is Standing.RUNNING
    assert reached == set(Standing) - {Standing.SUCCEEDED, Standing.FROZEN}
    assert labels == {rule.label for rule in RULES}
    assert Evidence is type(EVERY_EVIDENCE[0])


def test_an_intent_is_read_from_the_record() -> None:
    """Each part of the record decides the part of the intent that it should."""
    running = Status(created_at=1, started_at=2, pid=7, paused=True, stop_requested_at=5, expires_at=9)
    found = make_intent(metadata("on-failure:2", count=2), running, is_frozen=True, is_over=True, is_ready=False)
    assert found == Intent(
        standing=Standing.FROZEN,
        policy=RestartKind.ON_FAILURE,
        attempts=Attempts.USED_UP,
        stop=Stop.ASKED,
        expiry=Expiry.OVER,
        pause=Pause.ASKED,
        place=Place.LAST,
        maker=Maker.POLICY,
        home=Home.NOT_READY,
    )
    for stage, status in STATUSES.items():
        assert make_intent(metadata(), status).expiry is Expiry.NONE, stage


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("no", RestartPolicy(RestartKind.NO)),
        ("on-failure", RestartPolicy(RestartKind.ON_FAILURE)),
        ("on-failure:3", RestartPolicy(RestartKind.ON_FAILURE, 3)),
        ("always", RestartPolicy(RestartKind.ALWAYS)),
        ("unless-stopped", RestartPolicy(RestartKind.UNLESS_STOPPED)),
    ],
)
def test_policies_are_read_as_they_are_written(text: str, policy: RestartPolicy) -> None:
    """Each policy is read, and written the same again."""
    assert parse_restart_policy(text) == policy
    assert str(policy) == text


@pytest.mark.parametrize(
    "text", ["", "No", "on-failure:", "on-failure:0", "on-failure:03", "on-failure:-1", "always:3", "no\n", 3, None]
)
def test_what_is_no_policy_is_refused(text: object) -> None:
    """Anything else is refused, with what may be given."""
    with pytest.raises(InvalidInputError, match="on-failure:3"):
        parse_restart_policy(text)


def test_delays_double_to_a_minute_and_begin_anew_after_a_steady_run() -> None:
    """100 ms, 200 ms and so on up to 60 s; after a run of ten seconds 100 ms again."""
    short = Status(created_at=1, started_at=1, finished_at=10**9, exit_code=1)
    delay, delays = 0, []
    for count in range(12):
        delay = next_delay(metadata("always", count, delay), short)
        delays.append(delay // 10**6)
    assert delays == [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 51200, 60000, 60000]
    steady = Status(created_at=1, started_at=1, finished_at=10**10 + 1, exit_code=1)
    assert next_delay(metadata("always", 9, delay), steady) == 10**8
    set_back = Status(created_at=1, started_at=10**10, finished_at=1, exit_code=1)
    assert next_delay(metadata("always", 1, 10**8), set_back) == 2 * 10**8


def test_attempts_are_used_up_at_the_policys_number() -> None:
    """`on-failure:2` allows two restarts; without a number there is no end."""
    assert [is_used_up(metadata("on-failure:2", count)) for count in (0, 1, 2, 3)] == [False, False, True, True]
    assert not is_used_up(metadata("on-failure", 999))
    ended = Status(created_at=1, started_at=2, finished_at=3, exit_code=1, reason="Error")
    assert restart_due_at(metadata("on-failure:1"), ended) == 3 + 10**8
    assert restart_due_at(metadata("on-failure:1", count=1), ended) == 0
