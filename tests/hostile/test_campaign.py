"""What comes from outside, however hostile: accepted or refused in words, in bounded time, and nothing else touched."""

import pytest

from tests.campaigns.hostile.campaign import KINDS, run_kind
from tests.campaigns.hostile.oracle import Fate
from tests.campaigns.sizes import CAMPAIGNS, Size

INPUTS = {
    "config": 1500,
    "name": 1000,
    "path": 125,
    "bundle": 50,
    "layer": 350,
    "layout": 250,
    "entry": 100,
    "row": 40,
    "command": 200,
    "process": 15,
}
"""So many of each kind in the gate. `python -m tests.campaigns.hostile` tries more."""
SEED = 20_240_611


@pytest.mark.campaign("hostile")
@pytest.mark.parametrize("kind", KINDS)
def test_no_hostile_input_breaks_a_promise(kind: str, size: Size) -> None:
    """Only refusals that say why come out, nothing around is touched, and what was good before goes on working."""
    tally = run_kind(kind, SEED, range(0, INPUTS[kind], size.every))
    assert not tally.findings, "\n".join(map(str, tally.findings))
    if size.every == 1:
        assert tally.counts[Fate.ACCEPTED], "nothing was accepted: these inputs reach no further than the first check"


def test_all_kinds_together_are_the_campaign() -> None:
    """The table of sizes has as many inputs as there are of all kinds."""
    assert INPUTS.keys() == KINDS.keys()
    assert sum(INPUTS.values()) == CAMPAIGNS["hostile"].gate
