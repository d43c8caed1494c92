"""Who signals knows itself: an engine may run in one of its own containers."""

import os
import subprocess
import sys

from limpet.recovery.ourselves import find_own_lineage, is_in_own_group

SCRIPT = """
import os
from limpet.recovery.ourselves import find_own_lineage, is_in_own_group
lineage = find_own_lineage()
print(os.getpid() in lineage, os.getppid() in lineage, is_in_own_group(os.getpgrp()), is_in_own_group(os.getppid()))
print(*lineage)
"""


def test_a_process_knows_itself_and_its_ancestors() -> None:
    """It, its parents up to the first process, and its group; no other process."""
    neighbour = subprocess.Popen(["sleep", "1000"])
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, start_new_session=True
    ).stdout.splitlines()
    assert told[0] == "True True True False"
    lineage = set(map(int, told[1].split()))
    assert {os.getpid(), os.getppid()} <= lineage
    assert neighbour.pid not in lineage
    neighbour.kill()
    neighbour.wait()
    assert find_own_lineage() < lineage
    assert is_in_own_group(os.getpgrp())
