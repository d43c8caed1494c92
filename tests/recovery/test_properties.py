"""Recovery is right about worlds that Hypothesis draws, and a recovery that is wrong is caught."""

import subprocess
import sys
from pathlib import Path

import pytest

from limpet.engine.drill import inside
from tests.campaigns.sizes import Size

ROOT = Path(__file__).parents[2]
BLIND_TO_STRANGERS = """
import sys
from limpet.engine.starters.process import ProcessStarter
from limpet.recovery.evidence import Process
from tests.campaigns.worlds import Recovery, main
del Recovery.recover_again  # where it changes its mind, too: that may be found first
ProcessStarter.__init__.__kwdefaults__["compare"] = lambda *_: (Process.ALIVE, "")
sys.exit(main())
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.usefixtures("namespaces")
@pytest.mark.campaign("worlds")
@pytest.mark.timeout(300)
def test_every_verdict_is_true(size: Size) -> None:
    """Whatever has happened while the engine was down, it says what is true or that it does not know."""
    result = run(sys.executable, "-m", "tests.campaigns.worlds", "--examples", str(size.least), "--seed", "1")
    assert result.returncode == 0, result.stdout + result.stderr[-8000:]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_false_verdict_is_found() -> None:
    """A recovery that takes whoever has a container's pid for its process is caught, with the way to it."""
    arguments = ("--inside", "--examples", "300", "--seed", "1", "--no-shrink")
    result = run(*inside.unshare(), sys.executable, "-c", BLIND_TO_STRANGERS, *arguments)
    assert result.returncode != 0
    assert "and the truth is" in result.stderr
