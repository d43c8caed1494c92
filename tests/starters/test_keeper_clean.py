"""The keeper is small and clean: nothing of the host gets into it, and nothing of it into a container."""

import os
import re
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from limpet import Engine, errors
from tests.conftest import read_descriptors, wait_until
from tests.output import read_output
from tests.starters.host import make
from tests.starters.keepers import KEEPER, Start, find_keepers, kill
from tests.tools_image import load_tools

IMPORTS_NOTHING = """
import sys
sys.path.insert(0, sys.argv[1])
from keeper import main

anchor = main._anchor

def import_nothing(*given):
    sys.meta_path.clear()
    anchor(*given)

main._anchor = import_nothing
main.main()
"""


@pytest.mark.usefixtures("namespaces")
def test_a_keeper_needs_none_of_its_files(
    engine: Engine, state_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python and limpet may be upgraded, or removed, while containers run: what it needs it has loaded by then."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", IMPORTS_NOTHING)
    image = str(load_tools(engine, tmp_path / "tools", {"Env": ["PATH=/bin"]}))
    for life in ("first", "next"):
        for root in ("host", image):
            key = f"{life}-{len(root)}"
            container = make(engine, key, "sh", "-c", "echo on; exit 7", image={"image": root}, log_path=f"{key}.log")
            container.start()
            assert container.wait(20).exit_code == 7
            assert read_output(container.metadata.log_path, "on\n") == "on\n"
        with pytest.raises(errors.StartError, match="No such file or directory"):
            make(engine, f"{life}-none", "/no/such/program").start()
        kill(state_dir, *KEEPER, "limpet-copier")
        wait_until(lambda: "limpet-anchor" not in find_keepers(state_dir), "the anchor to take over")


def test_a_container_has_nothing_of_the_hosts(engine: Engine, state_dir: str, tmp_path: Path) -> None:
    """Descriptors, umask, signals, session, terminal, oom score: those of a new process, whatever the host's are."""
    kept = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(kept, True)
    score = Path("/proc/self/oom_score_adj")
    old_score = score.read_text()
    score.write_text("500")
    old_mask = os.umask(0o077)
    old_handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    script = "ls /proc/self/fd | wc -w; umask; grep -E '^Sig(Blk|Ign)' /proc/self/status; cat /proc/self/oom_score_adj"
    container = make(engine, "one", "sh", "-c", f"{script}; echo end", log_path="one.log")
    try:
        container.start()
    finally:
        score.write_text(old_score)
        os.umask(old_mask)
        signal.signal(signal.SIGUSR1, old_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        os.close(kept)
    fields = read_output(container.metadata.log_path, "end\n").split()
    # ls has opened the directory itself.
    assert fields == ["4", "0022", "SigBlk:", "0" * 16, "SigIgn:", "0" * 16, "0", "end"]
    keeper = Path(f"/proc/{find_keepers(state_dir)['limpet-keeper']}/oom_score_adj")
    assert int(keeper.read_text()) in {-900, 0}
    assert os.getsid(0) != container.status.identity.pid  # type: ignore[union-attr]


def test_the_keeper_is_small_and_ends_when_nothing_is_left(state_dir: str) -> None:
    """All its processes together take at most 20 MB, with 50 containers; it ends by itself after the last of them."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        containers = [make(engine, f"c{n}", "sleep", "1000", log_path=f"{n}.log") for n in range(50)]
        for container in containers:
            container.start()
        pids = find_keepers(state_dir)
        assert set(pids) >= {"limpet-anchor", "limpet-keeper"}
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids.values()]
        sizes = [int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:")]
        assert sum(sizes) < 20 * 1024
        for container in containers:
            container.stop(0)
            container.release()
    wait_until(lambda: not find_keepers(state_dir), "the keeper to end")


def test_the_keeper_inherits_nothing(state_dir: str, tmp_path: Path) -> None:
    """It is in / with umask 022, in a session of its own, without the host's descriptors or environment."""
    script = (
        "import os, sys\nfrom limpet import Engine\n"
        "kept = os.open(sys.argv[2], os.O_RDONLY); os.set_inheritable(kept, True); os.umask(0o077)\n"
        "with Engine.open(sys.argv[1]) as e:\n"
        " s = e.create_sandbox({'metadata': {'name': 's'}})\n"
        " e.create_container({'metadata': {'name': 'c'}, 'image': {'image': 'host'}, 'command': ['sleep', '9']}, s.id)"
        ".start()\n"
    )
    environment = {**os.environ, "SECRET": "x"}
    subprocess.run([sys.executable, "-c", script, state_dir, str(tmp_path)], env=environment, check=True)
    for pid in find_keepers(state_dir).values():
        links = read_descriptors(pid)
        assert str(tmp_path) not in links
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert "Umask:\t0022" in Path(f"/proc/{pid}/status").read_text()
        assert b"SECRET" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert os.getsid(pid) != os.getsid(0)
    with Engine.open(state_dir) as engine:
        engine.list()[0].stop(0)


TELL_INHERITED = """
import ctypes, subprocess
libc = ctypes.CDLL(None)
told = [libc.personality(0xFFFFFFFF), *(libc.prctl(asked, 0, 0, 0, 0) for asked in (30, 34, 42))]
with open("/proc/self/coredump_filter") as file:
    told.append(int(file.read(), 16))
print(*told, subprocess.run("ionice", stdout=subprocess.PIPE).stdout.decode().split(":")[0])
"""
"""Asks for timer slack, the policy at memory errors, and whether huge pages are off, as prctl(2) numbers them."""


def test_what_is_handed_down_is_that_of_a_new_process(engine_process: Start) -> None:
    """Personality, timer slack, core dumps, I/O priority and the like: not those of who began the keeper.

    Else a container would have them of an engine that is long gone.
    """
    process = engine_process(
        """
import ctypes, subprocess
libc = ctypes.CDLL(None)
libc.personality(0x0040000)  # ADDR_NO_RANDOMIZE
for option, *value in ((29, 123456, 0), (33, 1, 1), (41, 1, 0)):
    libc.prctl(option, *value, 0, 0)
with open("/proc/self/coredump_filter", "w") as file:
    file.write("0x7")
subprocess.run(["ionice", "-c", "3", "-p", str(os.getpid())], check=True)
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
config = {"metadata": {"name": "c"}, "image": {"image": "host"}, "log_path": "c"}
"""
        f"command = [sys.executable, '-c', {TELL_INHERITED!r}]\n"
        """
container = engine.create_container({**config, "command": command}, "jobs")
container.start()
container.wait(20)
say(*(entry.text.decode().strip() for entry in container.read_log()))
"""
    )
    assert process.read() == ["0", "50000", "2", "0", str(0x33), "none"]  # 2: PR_MCE_KILL_DEFAULT


def test_a_limit_of_open_files_that_is_set_later_is_handed_on(engine_process: Start) -> None:
    """What an engine has raised for itself is put back in containers; what its program has set since, they get."""
    process = engine_process(
        """
import resource
def tell_limit(name):
    config = {"metadata": {"name": name}, "image": {"image": "host"}, "log_path": name}
    container = engine.create_container({**config, "command": ["sh", "-c", "ulimit -Sn; ulimit -Hn"]}, "jobs")
    container.start()
    container.wait(20)
    say(" ".join(entry.text.decode().strip() for entry in container.read_log()))

resource.setrlimit(resource.RLIMIT_NOFILE, (500, 1000))
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
tell_limit("one")
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 900))
tell_limit("two")
Engine.open(state_dir + "-other").close()
tell_limit("three")
"""
    )
    assert [process.read() for _ in range(3)] == [["500", "1000"], ["300", "900"], ["300", "900"]]


def describe_standing(pid: int) -> tuple[object, ...]:
    """Return what a process has of its parent: CPUs, policy, niceness, limits."""
    limits = (resource.RLIMIT_FSIZE, resource.RLIMIT_STACK, resource.RLIMIT_MSGQUEUE)
    scheduling = os.sched_getaffinity(pid), os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)
    return (*scheduling, *(resource.prlimit(pid, number) for number in limits))


def may_lower_niceness() -> bool:
    capabilities = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) >> 23 & 1)  # CAP_SYS_NICE


def test_limits_and_scheduling_are_those_of_the_engine_that_starts_it(engine_process: Start, state_dir: str) -> None:
    """Not those of the one by which the keeper was begun; as far as it need not, the keeper is bound by none itself."""
    narrow = engine_process(
        """
import resource
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.nice(7)
for number in (resource.RLIMIT_FSIZE, resource.RLIMIT_STACK, resource.RLIMIT_MSGQUEUE):
    resource.setrlimit(number, (1 << 22 if number != resource.RLIMIT_MSGQUEUE else 4096, resource.getrlimit(number)[1]))
engine = Engine.open(state_dir)
engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
config = {"metadata": {"name": "a"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}
container = engine.create_container(config, "jobs", id="a")
say(container.start().pid); time.sleep(999)
"""
    )
    pid = int(*narrow.read())
    assert describe_standing(pid) == describe_standing(narrow.pid) != describe_standing(os.getpid())
    narrow.kill()
    with Engine.open(state_dir) as engine:
        second = make(engine, "b", "sleep", "1000")
        assert describe_standing(second.start().pid)[:2] == describe_standing(os.getpid())[:2]
        if may_lower_niceness():  # else the keeper stays as nice as it was begun
            assert describe_standing(second.status.pid) == describe_standing(os.getpid())
            keeper = find_keepers(state_dir)["limpet-keeper"]
            assert describe_standing(keeper)[1:3] == (os.SCHED_OTHER, 0)
            assert os.sched_getaffinity(keeper) >= os.sched_getaffinity(0)
        for container in engine.list():
            container.stop(0)


def test_the_keeper_keeps_nothing_of_its_program(engine: Engine, state_dir: str) -> None:
    """A pipe that the program lets its children have ends with the program; and no other user gets at the keeper's."""
    read, write = os.pipe()
    try:
        os.set_inheritable(write, True)
        make(engine, "one", "sh", "-c", "echo here; sleep 1000", log_path="one.log").start()
    finally:
        os.close(write)
    os.set_blocking(read, False)
    assert os.read(read, 1) == b""
    os.close(read)
    directory = Path(state_dir, "keeper")
    found = {str(path.relative_to(directory)): path.lstat().st_mode for path in (directory, *directory.rglob("*"))}
    assert found.keys() >= {".", "lock", "socket", "journal"}
    open_to_all = {name for name, mode in found.items() if mode & 0o077 and not stat.S_ISLNK(mode)}
    assert open_to_all == {"fifo/one.out", "fifo/one.err"}  # which whoever the container is may open, by its own links
    engine.get("one").stop(0)
