"""The plan is drawn from the seed alone, and leaves nothing out that the drill can do."""

from collections import Counter

from limpet.engine.drill.script import Disaster, Scenario, Verb, draw_rounds


def test_the_same_seed_plans_the_same_drill() -> None:
    """A seed repeats the plan, another plans another drill, and a shorter drill is a longer one's beginning."""
    plan = list(draw_rounds(6, 20, 7))
    assert plan == list(draw_rounds(6, 20, 7))
    assert not any(ours == others for ours, others in zip(plan, draw_rounds(6, 20, 8), strict=True))
    assert plan[:3] == list(draw_rounds(3, 20, 7))[:3]


def test_a_plan_is_whole() -> None:
    """Every call and disaster is planned, steps are numbered without a gap, what is made is deleted in the end."""
    plan = list(draw_rounds(15, 20, 1))
    verbs, made, deleted = Counter[Verb](), list[str](), set[str]()
    for planned in plan:
        steps = [step for lane in (planned.first, *planned.lanes) for step in lane]
        assert [step.number for step in steps] == list(
            range(1 - len(planned.first), 1 + len(steps) - len(planned.first))
        )
        assert planned.kill is None or 0 < planned.kill.count <= len(steps)
        verbs.update(step.verb for step in steps)
        made += [step.target for step in steps if step.verb is Verb.CREATE]
        deleted.update(step.target for step in steps if step.verb is Verb.DELETE)
        deleted.update(member for step in steps if step.verb is Verb.DROP for member in step.members)
    assert set(verbs) == set(Verb)
    assert {each.disaster for planned in plan for each in planned.disturbances} == set(Disaster) - {Disaster.REBOOT}
    assert sorted(made) == sorted(each.id for planned in plan for each in planned.containers)
    assert len(made) == len(set(made)) == 15 * 20
    assert set(made) <= deleted
    assert [planned.number for planned in plan if planned.kill is None] == [16]
    assert any(planned.recovery_kills for planned in plan)
    assert any(planned.reaped_late for planned in plan)


def test_each_scenario_plans_its_disasters() -> None:
    """Strangers get pids where that is rehearsed, a reboot comes last in its round, and no zombie is left."""
    for scenario, wanted in ((Scenario.REUSE, Disaster.REPLACE), (Scenario.REBOOT, Disaster.REBOOT)):
        for planned in list(draw_rounds(9, 12, 3, scenario))[:-1]:
            disasters = [each.disaster for each in planned.disturbances]
            assert wanted in disasters
            assert Disaster.REBOOT not in disasters[:-1]
            assert not planned.reaped_late
