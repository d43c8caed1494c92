"""Who uses a directory: every kind of use is seen, and no neighbour can make the look hang, or make it large."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from limpet.recovery import users
from limpet.recovery.users import Users, find_users
from tests.conftest import wait_until

AS_ROOT = () if os.geteuid() == 0 else ("--user", "--map-root-user")


@contextmanager
def running(*command: str, cwd: Path | None = None) -> Iterator[int]:
    """Run a program that prints a line when it is ready."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate()


READY = "import time, sys, os; {}; print('ready', flush=True); time.sleep(1000)"


def test_each_kind_of_use_is_seen(tmp_path: Path) -> None:
    """Working directory, open file, program and root: each by another process, each in its own directory."""
    used = {name: tmp_path / name for name in ("cwd", "file", "exe", "unused", "neighbour")}
    for path in used.values():
        path.mkdir()
    program = used["exe"] / "program"
    program.write_bytes(Path("/bin/sleep").resolve().read_bytes())
    program.chmod(0o700)
    (used["file"] / "deep").mkdir()
    opened = READY.format("f = open('deep/file', 'w')")
    with (
        running(sys.executable, "-c", READY.format("pass"), cwd=used["cwd"]) as cwd,
        running(sys.executable, "-c", f"import os; os.chdir({str(used['file'])!r}); {opened}; ") as file,
        running("sh", "-c", f"echo ready; exec {program} 1000") as exe,
    ):
        wait_until(lambda: os.readlink(f"/proc/{exe}/exe") == str(program), "the program to be executed")
        found = find_users([str(path) for path in used.values()])
    expected = {str(used["cwd"]): cwd, str(used["file"]): file, str(used["exe"]): exe}
    assert found.pids == expected
    assert find_users([str(path) for path in used.values()]).pids == {}


def test_who_ends_amid_the_look_hides_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was listed and is gone once it is looked at is passed by: those after it are looked at."""
    real = os.listdir
    with subprocess.Popen(["true"]) as process:
        pass
    listed = {"/proc": [str(process.pid)]}
    with running(sys.executable, "-c", READY.format("pass"), cwd=tmp_path) as pid:
        monkeypatch.setattr(os, "listdir", lambda path: [*listed.get(path, ()), *real(path)])
        assert find_users([str(tmp_path)]).pids == {str(tmp_path): pid}


@pytest.mark.usefixtures("namespaces")
@pytest.mark.skipif(not os.path.exists("/proc/self/ns/mnt"), reason="no mount namespaces")
def test_a_mount_in_another_mount_namespace_is_use(tmp_path: Path) -> None:
    """A container that has the directory as its root sees it under another name; it uses it all the same."""
    used, unused = tmp_path / "used", tmp_path / "unused"
    for path in (used / "rootfs", unused, tmp_path / "elsewhere"):
        path.mkdir(parents=True)
    script = f"mount --bind {used}/rootfs {tmp_path}/elsewhere && cd / && echo ready && exec sleep 1000"
    with running("unshare", *AS_ROOT, "-m", "sh", "-c", script):
        found = find_users([str(used), str(unused)])
    assert list(found.pids) == [str(used)]


@pytest.mark.usefixtures("namespaces")
def test_no_name_of_a_neighbours_mount_ends_the_look(tmp_path: Path) -> None:
    """Any user may mount at one with a carriage return, in a namespace of its own: the kernel does not escape it."""
    for name in ("a\rb", "used"):
        (tmp_path / name).mkdir()
    script = f"mount -t tmpfs x '{tmp_path}/a\rb' && mount --bind '{tmp_path}/used' '{tmp_path}/a\rb' && echo ready"
    with running("unshare", *AS_ROOT, "-m", "sh", "-c", f"{script} && exec sleep 1000"):
        assert list(find_users([str(tmp_path / "used")]).pids) == [str(tmp_path / "used")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of other users")
def test_what_root_may_not_inspect_may_use_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CAP_SYS_PTRACE root sees nothing of another user's process, which may be a container of its own."""
    real = os.readlink
    with subprocess.Popen(["sleep", "1000"], user=1234, cwd="/") as process:

        def readlink(path: str) -> str:
            if path.startswith(f"/proc/{process.pid}/"):
                raise PermissionError(13, "Permission denied", path)
            return real(path)

        monkeypatch.setattr(os, "readlink", readlink)
        try:
            assert find_users([str(tmp_path)]).hidden == f"process {process.pid} cannot be inspected: Permission denied"
        finally:
            process.kill()


@pytest.mark.usefixtures("namespaces")
def test_the_look_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of descriptors, thousands of mounts, or a slow kernel: it stops in time, and says so."""
    begun = time.monotonic()
    assert "more to look at" in find_users([str(tmp_path)], time_limit_seconds=0.0).hidden
    monkeypatch.setattr(users, "_MOST_MOUNTS_BYTES", 100)
    with running("unshare", *AS_ROOT, "-m", "sh", "-c", "echo ready; exec sleep 1000"):
        hidden = find_users([str(tmp_path)]).hidden
    # Of many processes in other mount namespaces, on a busy machine, the first is told.
    assert re.match(r"process \d+ cannot be inspected: it has more than 100 bytes of mounts", hidden)
    assert find_users([]) == Users()
    assert time.monotonic() - begun < 20


def test_nothing_that_can_hang_is_asked_of_a_neighbour(tmp_path: Path) -> None:
    """Recovery's looks open no `environ`, `cmdline` or `maps` of any process: they wait for its memory."""
    script = f"""
import os, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in ("open", "os.listdir") else None)
from limpet.engine.store import Store
from limpet.engine.inspection.dry_run import find_orphans
from limpet.recovery import HostProbe
from limpet.recovery.users import find_users
find_users([{str(tmp_path)!r}])
forbidden = ("/environ", "/cmdline", "/maps", "/smaps", "/mem", "/stack", "/wchan")
print([path for path in opened if path.startswith("/proc/") and path.endswith(forbidden)])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
