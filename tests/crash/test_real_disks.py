"""Real file systems lose power amid a store's life."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns.real_disks import FILE_SYSTEMS
from tests.campaigns.sizes import Size
from tests.conftest import require_tools

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
needs_loop = pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="there are no loop devices here")


@pytest.mark.long
@needs_root
@needs_loop
@pytest.mark.campaign("disks")
@pytest.mark.timeout(300)
def test_real_power_cuts(size: Size, tmp_path: Path) -> None:
    """After power cuts of ext4 and XFS all that was acknowledged is there; a store that does not flush loses it."""
    require_tools(*(f"mkfs.{kind}" for kind in FILE_SYSTEMS))
    options = ["--cuts", str(size.least), "--seed", "1", "--dir", str(tmp_path)]
    command = [sys.executable, "-m", "tests.campaigns.real_disks", *options]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert os.listdir(tmp_path) == []
