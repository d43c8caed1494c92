"""Interrupts at every place of a store's and an engine's life, and failing allocations: nothing is lost or stuck."""

import pytest

from tests.campaigns.interrupts import Order, campaign
from tests.campaigns.sizes import Size


@pytest.mark.campaign("interrupts")
@pytest.mark.timeout(1200)
def test_interrupts_and_failing_allocations(size: Size) -> None:
    """Struck once or twice, then closed or left: the next opening has what was acknowledged, and all got an answer."""
    every = max(size.every, 5)
    orders = [
        Order("store", "interrupt", 8 * every),
        Order("tasks", "interrupt", 2 * every),
    ]
    if size.every == 1:
        # Few: where an allocation of Python's own fails, its threads may hang or end in errors that name no memory.
        orders += [Order("store", "memory", 4_000), Order("tasks", "memory", 8_000), Order("engine", "memory", 4_000)]
        orders += [Order("engine", "interrupt", 60), Order("served", "memory", 4_000)]
        orders.append(Order("crew", "interrupt", 100))
    results = [campaign(order) for order in orders]
    assert [finding for result in results for finding in result.findings] == []
    assert sum(result.trials for result in results) >= size.least


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_engine_for_tasks_is_handed_over_or_closed() -> None:
    """Struck while what was opened gets its front, which nobody has yet, it keeps no lock."""
    result = campaign(Order("crew", every=2, within="AsyncEngine.__init__"))
    assert (result.findings, result.trials > 0) == ([], True)


@pytest.mark.long
def test_a_broken_closing_is_caught() -> None:
    """A store that cannot be closed again after an interrupt fails the campaign."""
    assert campaign(Order("store", every=3, within="Store.close", control="close-once")).findings


@pytest.mark.long
def test_a_step_that_is_cut_in_two_is_caught() -> None:
    """An engine whose steps the main thread does itself fails the campaign: a container is added, and not made."""
    assert campaign(Order("engine", every=25, within="Engine.add_container", control="cut-steps")).findings
