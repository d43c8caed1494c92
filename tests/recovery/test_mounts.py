"""What is mounted in a tree is found however few its entries are, and the top of the tree counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from limpet.recovery import mounts
from limpet.recovery.mounts import find_mounts, read_mount_id

# Mounts and asks: with nothing mounted, then with each mount alone, which is undone before the next.
PROGRAM = """
import json, os, subprocess, sys
from limpet.recovery.mounts import find_mounts
top = sys.argv[1]
told = [find_mounts(top)]
for point, *how in json.loads(sys.argv[2]):
    subprocess.run(["mount", *how, os.path.join(top, point)], check=True)
    told.append(find_mounts(top))
    subprocess.run(["umount", os.path.join(top, point)], check=True)
print(json.dumps(told))
"""

# Mounts at the top, and asks by a link to it, then as a user who may not come near.
OTHERWISE = """
import os, subprocess, sys
from contextlib import suppress
from limpet.recovery.mounts import find_mounts
top = sys.argv[1]
os.symlink("top", f"{top}-link")
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", top], check=True)
by_link = find_mounts(f"{top}-link")
with suppress(OSError):  # one who is not root has no other user to become
    os.setresuid(65534, 65534, 65534)
print(by_link == find_mounts(top) == [top])
"""


def apart(program: str, *args: str) -> str:
    """What a program prints in a mount namespace of its own."""
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", program, *args]
    if os.geteuid() == 0:
        command.remove("--map-root-user")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and ("unshare:" in done.stderr or "mount:" in done.stderr):
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_mount_in_a_small_tree_is_found(tmp_path: Path) -> None:
    """At the top, on an empty directory, far below, on a file: each is told by its path."""
    top = tmp_path / "top"
    (top / "rootfs" / "a" / "b").mkdir(parents=True)
    (top / "working").mkdir()
    (top / "config.json").touch()
    bind = ["--bind", str(top)]
    asked = [
        ["", *bind],
        ["working", *bind],
        ["rootfs/a/b", *bind],
        ["config.json", "--bind", str(top / "config.json")],
    ]
    none, *told = json.loads(apart(PROGRAM, str(top), json.dumps(asked)))
    assert none == []
    # What is bound to the top is seen again in whatever is bound below it.
    assert [each[0].rstrip("/") for each in told] == [str(top / point).rstrip("/") for point, *_ in asked]


def test_a_mount_is_found_by_a_link_and_where_nobody_may_look(tmp_path: Path) -> None:
    """What cannot be asked one by one is no proof that nothing is mounted: it may be removed then, with what is."""
    (tmp_path / "top").mkdir()
    tmp_path.chmod(0o700)
    assert apart(OTHERWISE, str(tmp_path / "top")) == "True\n"


def test_a_large_tree_and_a_missing_one_have_no_mount(tmp_path: Path) -> None:
    """Where entries are not asked one by one the answer is the same."""
    for number in range(40):
        (tmp_path / "large" / str(number)).mkdir(parents=True)
    assert find_mounts(str(tmp_path / "large")) == []
    assert find_mounts(str(tmp_path / "missing")) == []


def test_the_mount_of_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two mounts differ, and a kernel without statx's answer is asked in another way."""
    found = {}
    for path in ("/", "/proc"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        found[path] = read_mount_id(descriptor)
        with monkeypatch.context() as patch:
            patch.setattr(mounts, "_statx", None)
            assert read_mount_id(descriptor) == found[path]
        os.close(descriptor)
    assert found["/"] != found["/proc"]


NAMES = (
    "carriage\rreturn",
    "form\ffeed",
    "group\x1cseparator",
    "next\x85line",
    "line\u2028separator",
    "new\nline",
    "a - b c",
)

# Mounts at names that end a line elsewhere, and asks all who read mountinfo.
ODD = """
import os, subprocess, sys
from limpet.engine.starters.process.cgroups.hierarchies import read_cgroups
from limpet.engine.starters.propagation import read_propagation
from limpet.recovery.mounts import read_mounts
before = read_cgroups(0)
for path in sys.argv[1:]:
    os.mkdir(path)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
points = {mount.point for mount in read_mounts()}
told = [set(sys.argv[1:]) <= points, read_cgroups(0) == before, read_propagation("/") is not None]
print(*told)
"""


def test_a_mount_whose_name_ends_a_line_elsewhere_is_one_mount(tmp_path: Path) -> None:
    """The kernel escapes a newline alone: any user may mount at such names, and whoever reads all mounts reads them."""
    assert apart(ODD, *(str(tmp_path / name) for name in NAMES)).split() == ["True", "True", "True"]
