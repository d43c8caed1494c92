"""The harness has teeth: each broken store is caught by the trial that it is meant for."""

import pytest

from tests.crash.mutants import MUTANTS
from tests.crash.trial import WORKERS, run


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_store_is_caught(name: str) -> None:
    """Its trial finds something lost, torn or false, where it finds nothing in the store as it is."""
    mutant = MUTANTS[name]
    trial = mutant.trial.format(life=f"MUTANTS[{name!r}].life()", workers=WORKERS, every=mutant.every)
    assert run(trial)["violations"] > 0
