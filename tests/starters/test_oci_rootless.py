"""OCI containers of an engine that is not root: isolated, seen to end, and what cannot be had is refused or told."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from limpet.recovery.host import read_exit_code
from tests.conftest import is_running, require_tools, wait_until
from tests.drill.test_command import ROOT, as_nobody
from tests.starters.oci import TOOLS

PRELUDE = """
import json, os, pathlib, subprocess, sys, time
sys.path.insert(0, sys.argv[2])
from limpet import Engine, OciStarter, errors
from tests.starters.oci import config, load_busybox
home = pathlib.Path(sys.argv[1])
engine = Engine.open(str(home / "state"), runtimes={name: OciStarter(name) for name in ("runc", "crun")})
"""
LIFE = """
load_busybox(engine, home / "image", needs_root=False)
sandbox = engine.create_sandbox({"metadata": {"name": "a"}, "hostname": "pod"}, id="a", runtime_handler="runc")
limits = {"linux": {"resources": {"memory_limit_in_bytes": "9999999"}}}
one = engine.create_container(config("one", "id -u; echo $$; hostname; echo x > /new && exit 7", **limits), sandbox)
one.start()
code = one.wait(20).exit_code
said = {"code": code, "log": [entry.text.decode() for entry in one.read_log()], "unapplied": dict(one.status.unapplied)}
said["resources"] = sorted(one.status.resources.unapplied)
refused = {}
for name, context in (
    ("user", {"run_as_user": {"value": 70000000}}),
    ("groups", {"supplemental_groups": [0, 7]}),
    ("pid", {"namespace_options": {"pid": "NODE"}}),
):
    try:
        engine.create_container(config(name, "true", linux={"security_context": context}), sandbox)
    except errors.InvalidInputError as error:
        refused[name] = str(error)
try:
    OciStarter("runc", cni="/etc/cni/net.d").furnish(sandbox.metadata, {})
except errors.UnsupportedError as error:
    refused["cni"] = str(error)
said["refused"] = refused
two = engine.create_container(config("two", "trap 'exit 5' TERM; while :; do sleep 0.05; done"), sandbox, id="two")
two.start()
said["exec"] = two.execute(["id", "-u"]).output.decode()
try:
    two.execute(["sleep", f"4718{os.getpid()}"], timeout=0.3)
except errors.WaitTimeoutError:
    for _ in range(100):
        time.sleep(0.1)
        found = subprocess.run(["pgrep", "-fx", f"sleep 4718{os.getpid()}"], capture_output=True, text=True)
        if not found.stdout:
            break
    said["left"] = found.stdout
left_over = two.open_command(["sh", "-c", f"(sleep 4719{os.getpid()} &); echo on; sleep 4719{os.getpid()}"])
left_over.read(20)
said["command"] = f"sleep 4719{os.getpid()}"
(home / "command").write_text(said["command"])
print(json.dumps(said), two.status.pid, flush=True)
os._exit(0)  # as killed
"""
NEXT = """
two = engine.get("two")
assert not [*home.glob("state/containers/two/oci/*/exec-*")]
assert subprocess.run(["pgrep", "-fx", (home / "command").read_text()], stdout=subprocess.DEVNULL).returncode == 1
print(two.state.name, two.stop(10).exit_code)
engine.get_sandbox("a").remove(force=True, timeout=0)
engine.close()
"""


@pytest.fixture
def home() -> Iterator[str]:
    path = tempfile.mkdtemp()
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    yield path
    shutil.rmtree(path)


def run(home: str, script: str, within: Sequence[str] = (), inside: Sequence[str] = ()) -> str:
    """Run a script as an ordinary user, root having begun `within` and the user `inside`; return its output."""
    command = [*inside, sys.executable, "-c", PRELUDE + script, home, str(ROOT)]
    command = [*within, *as_nobody(command)] if os.geteuid() == 0 else command
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_ordinary_user_has_containers(home: str) -> None:
    """Root in its container and nobody outside; over a kill of the engine; without cgroups, which is told."""
    require_tools(*TOOLS)
    text, _, pid = run(home, LIFE).strip().rpartition(" ")
    said = json.loads(text)
    assert (said["code"], said["log"]) == (7, ["0\n", "1\n", "pod\n"])
    assert said["resources"] == ["memory_limit_in_bytes"]
    assert "memory_limit_in_bytes" in said["unapplied"]
    assert "/etc/subuid" in said["refused"]["user"]
    assert "CONTAINER" in said["refused"]["pid"]
    assert said["refused"]["cni"].startswith("cni: only root's sandboxes")
    assert "supplemental_groups [7]" in said["refused"]["groups"]
    assert (said["exec"], said["left"]) == ("0\n", "")
    assert is_running(int(pid))
    find = ["pgrep", "-fx", said["command"]]
    assert subprocess.run(find, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert run(home, NEXT).split() == ["RUNNING", "5"]
    assert not is_running(int(pid))


FIELDS = """
load_busybox(engine, home / "image", needs_root=False)
reasons = {}
def told(name, script, sandbox, options=None, **fields):
    made = engine.create_sandbox({"metadata": {"name": name}, **sandbox}, runtime_handler="runc")
    if options is not None:
        fields["linux"] = {"security_context": {"namespace_options": options}}
    one = engine.create_container(config(name, script, **fields), made)
    one.start()
    one.wait(20)
    said = [[entry.text.decode().strip() for entry in one.read_log()], sorted(one.status.unapplied)]
    reasons.update(one.status.unapplied)
    made.remove(force=True)
    return said
def refused(**linux):
    try:
        engine.create_sandbox({"metadata": {"name": "never"}, "linux": linux}, runtime_handler="runc")
    except errors.InvalidInputError as error:
        return str(error)
sysctls = {"kernel.hostname": "by-sysctl", "kernel.msgmax": "4096", "net.core.somaxconn": "99"}
sysctls["net.ipv4.ping_group_range"] = "0 0"
paths = "/proc/sys/kernel/msgmax /proc/sys/net/core/somaxconn /proc/sys/net/ipv4/ping_group_range"
devices = [{"host_path": "/dev/full", "permissions": "r"}]
mounts = [{"host_path": str(home), "container_path": "/x", "propagation": "PROPAGATION_BIDIRECTIONAL"}]
pids = {"security_context": {"namespace_options": {"pid": "POD"}}}
print(json.dumps({
    "sysctls": told("a", f"hostname; cat {paths}", {"linux": {"sysctls": sysctls}}),
    "ipc": told("b", "ls -l /proc/self/ns/ipc | grep -o '[0-9]*.$'", {}, {"ipc": "NODE", "pid": "CONTAINER"}),
    "pid": told("c", "echo $$", {"linux": pids}),
    "parent": told("d", "echo on", {"linux": {"cgroup_parent": "/some/where"}}),
    "device": told("e", "test -c /dev/full && echo there", {}, devices=devices),
    "mounts": told("f", "echo on", {}, mounts=mounts),
    "propagation": reasons["mounts.propagation"],
    "refused": [refused(sysctls={name: value}) for name, value in (
        ("vm.swappiness", "1"), ("kernel.domainname", "x"), ("net.no.such", "1"), ("kernel.msgmax", "x"),
        *(("net.ipv4.ping_group_range", each) for each in ("0 70000000", "1 0", "0", "0 x")),
    )],
}))
engine.close()
"""


def test_what_fields_do_without_root(home: str) -> None:
    """Each is seen inside, told, or refused by its name before anything is started."""
    require_tools(*TOOLS)
    said = json.loads(run(home, FIELDS))
    assert said["sysctls"] == [["by-sysctl", "4096", "99", "0\t0"], []]
    (inode,), names = said["ipc"]
    assert (inode, names) == (f"{os.stat('/proc/self/ns/ipc').st_ino}]", ["namespace_options"])
    assert said["pid"] == [["1"], ["namespace_options"]]
    assert said["parent"] == [["on"], ["sandbox.cgroup_parent"]]
    assert said["device"] == [["there"], ["devices.permissions"]]
    assert said["mounts"] == [["on"], ["mounts.propagation"]]
    assert "in a user namespace" in said["propagation"]
    assert all(each.startswith("sysctls ") for each in said["refused"])
    refused = said["refused"]
    assert [each.split("sysctls ")[1].split(":")[0] for each in refused] == [
        f"'{name}'"
        for name in (
            *("vm.swappiness", "kernel.domainname", "net.no.such", "kernel.msgmax"),
            *["net.ipv4.ping_group_range"] * 4,
        )
    ]


with_ids = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give another user a range of ids")
WITH_IDS = """
load_busybox(engine, home / "image", needs_root=False)
sandbox = engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="runc")
web = {"security_context": {"run_as_user": {"value": 1003}, "run_as_group": {"value": 1001}}}
one = engine.create_container(config("one", "id -u; id -g; sleep 0.2; exit 7", linux=web), sandbox)
code = (one.start(), one.wait(20))[1].exit_code
two = engine.create_container(config("two", "sleep 1000", linux=web), sandbox)
two.start()
said = [code, [entry.text.decode().strip() for entry in one.read_log()], two.execute(["id", "-u"]).output.decode()]
session = two.open_command(["sh", "-c", "echo on; read line; busybox stty size"], terminal=True, size=(20, 30))
while b"on" not in session.read(20).data:
    pass
session.resize(44, 88)
time.sleep(0.5)
session.write(b"\\n")
size = b""
while (chunk := session.read(20)) is not None:
    size += chunk.data
session.close()
print(json.dumps([*said, size.decode().split()[-2:], two.stop(0).exit_code]))
lost = engine.create_container({**config("lost", linux=web), "command": ["/bin/lost"]}, sandbox)
try:
    lost.start()
except errors.StartError as error:
    print(error)
sandbox.remove(force=True)
engine.close()
"""


HIDDEN = """
load_busybox(engine, home / "image", needs_root=False)
sandbox = engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="runc")
web = {"security_context": {"run_as_user": {"value": 1003}, "run_as_group": {"value": 1001}}}
try:
    engine.create_container(config("one", "sleep 1000", linux=web), sandbox).start()
except errors.StartError as error:
    print(error)
two = engine.create_container(config("two", "exit 7"), sandbox)
two.start()
print(two.wait(20).exit_code)
sandbox.remove(force=True)
engine.close()
"""


def run_with_ids(
    home: str,
    script: str,
    *options: str,
    before: str = "true",
    after: str = "true",
    inside: Sequence[str] = (),
) -> list[str]:
    """Run a script as a user with a range of ids, in namespaces of its own; return what it prints."""
    require_tools(*TOOLS, "newuidmap")
    ids = os.path.join(home, "ids")
    with open(ids, "w", encoding="utf-8") as file:
        file.write("nobody:200000:65536\n")
    paths = ("/etc/subuid", "/etc/subgid")
    mounts = "; ".join(f"[ -e {path} ] || touch {path}; mount --bind {ids} {path}" for path in paths)
    within = ["unshare", "--mount", *options, "sh", "-ec", f'{mounts}; {before}; "$@"; {after}', "sh"]
    return run(home, script, within, inside).splitlines()


@pytest.mark.long
@with_ids
def test_a_first_process_that_proc_hides_is_told(home: str) -> None:
    """A user that is not its own is another's (hidepid); its own processes it sees, and containers of these run.

    What it does not see is ended all the same.
    """
    hide = "mount -o remount,hidepid=2 /proc"  # which concerns all mounts of that pid namespace's
    namespaces = ("--pid", "--fork", "--mount-proc")
    found = run_with_ids(home, HIDDEN, *namespaces, before=hide, after="pgrep -f '[r]unc init' || echo nothing is left")
    assert "/proc does not show it" in found[0]
    assert "hidepid" in found[0]
    assert found[1:] == ["7", "nothing is left"]
    assert os.listdir(os.path.join(home, "state/containers")) == []


@with_ids
def test_with_a_range_of_ids(home: str) -> None:
    """By newuidmap other users are had than root; their processes are known, run in, stopped and cleared away."""
    found = run_with_ids(home, WITH_IDS)
    assert json.loads(found[0]) == [7, ["1003", "1001"], "1003\n", ["44", "88"], 137]
    assert "/no/such/interpreter" in found[1] or "no such file" in found[1].lower()
    assert os.listdir(os.path.join(home, "state/containers")) == []


NESTED = """
if engine.list():
    two = engine.get("two")
    print(two.state.name, two.stop(10).exit_code)
    for each in "ab":
        engine.get_sandbox(each).remove(force=True, timeout=0)
    engine.close()
    sys.exit()
load_busybox(engine, home / "image", needs_root=False)
sandbox = engine.create_sandbox({"metadata": {"name": "a"}, "hostname": "pod"}, id="a", runtime_handler="runc")
def told(name, script, **context):
    limits = {"memory_limit_in_bytes": "99999999", "oom_score_adj": -500}
    fields = {"linux": {"resources": limits, "security_context": context}}
    try:
        one = engine.create_container(config(name, script, **fields), sandbox)
    except errors.InvalidInputError as error:
        return str(error)
    one.start()
    code, resources = one.wait(20).exit_code, one.status.resources
    return [code, " ".join(entry.text.decode().strip() for entry in one.read_log()), sorted(resources.unapplied)]
said = {
    "plain": told("plain", "id -u; echo $$; hostname; exit 7"),
    "user": told("user", "id -u; id -g", run_as_user={"value": 1003}, run_as_group={"value": 1001}),
    "far": told("far", "true", run_as_user={"value": 70000000}),
    "groups": told("groups", "id -G", supplemental_groups=[7]),
    "pid": told("pid", "true", namespace_options={"pid": "NODE"}),
}
two = engine.create_container(config("two", "trap 'exit 5' TERM; while :; do sleep 0.05; done"), sandbox, id="two")
two.start()
said["exec"] = two.execute(["id", "-u"]).output.decode()
other = engine.create_sandbox({"metadata": {"name": "b"}}, id="b", runtime_handler="crun")
try:
    engine.create_container(config("other", "true"), other)
except errors.UnsupportedError as error:
    said["crun"] = str(error)
print(json.dumps(said), flush=True)
os._exit(0)  # as killed
"""
TWICE = ["sh", "-ec", '"$@"; "$@"', "sh"]
"""The second engine is in the namespaces of the first."""
LITTLE = "an engine that is root of a user namespace alone"


def require_little(found: dict[str, object]) -> None:
    assert found["plain"] == [7, "0 1 pod", ["memory_limit_in_bytes", "oom_score_adj"]]
    assert str(found["far"]).startswith(f"uid 70000000: {LITTLE}")
    assert str(found["pid"]).startswith("namespace_options.pid: ")
    assert found["exec"] == "0\n"
    assert str(found["crun"]) == f"crun: {LITTLE} can use runc alone"


@pytest.mark.parametrize("namespaces", ["-Urm", "-Ur"])
def test_root_of_a_user_namespace_alone_has_containers(home: str, namespaces: str) -> None:
    """It is not taken for root of the host: what it cannot have is refused or told by name, and the rest works."""
    require_tools(*TOOLS)
    said, after = run(home, NESTED, inside=["unshare", namespaces, *TWICE]).splitlines()
    found = json.loads(said)
    require_little(found)
    assert found["user"].startswith(f"uid 1003: {LITTLE}")
    assert found["groups"].startswith("supplemental_groups [7]: ")
    assert after == "RUNNING 5"
    assert os.listdir(os.path.join(home, "state/containers")) == []


@with_ids
def test_root_of_a_user_namespace_with_a_range_of_ids(home: str) -> None:
    """Its containers have the users and the groups that there are in that namespace."""
    said, after = run_with_ids(home, NESTED, inside=["unshare", "-Urm", "--map-auto", *TWICE])
    found = json.loads(said)
    require_little(found)
    assert found["user"][:2] == [0, "1003 1001"]
    assert found["groups"][:2] == [0, "0 7"]
    assert after == "RUNNING 5"


UNREADABLE = """
load_busybox(engine, home / "image", needs_root=False)
sandbox = engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="runc")
from tests.starters.oci import processes_of
mounts = [{"host_path": str(home / "closed"), "container_path": "/closed", "readonly": True}]
program = ["/closed/busybox", "sh", "-c", "/closed/busybox sleep 1; exit 9"]
one = engine.create_container({**config("one", mounts=mounts), "command": program}, sandbox, id="one")
one.start()
os.kill(processes_of(str(home / "state"), "one").monitor.pid, 9)
print(one.wait(20).exit_code)
sandbox.remove(force=True)
engine.close()
"""
REAPS_LATE = """
import ctypes, os, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)).si_pid != pid:
    time.sleep(0.7)
    os.waitpid(found.si_pid, 0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a program that another user may not read")
def test_an_end_that_is_hidden_until_the_process_is_reaped_is_told(home: str) -> None:
    """Without its conmon, of a program that the engine's user may execute and not read: the kernel tells it then."""
    require_tools(*TOOLS)
    os.mkdir(f"{home}/closed")
    shutil.copy(shutil.which("busybox") or "", f"{home}/closed/busybox")
    os.chmod(f"{home}/closed/busybox", 0o711)
    found = run(home, UNREADABLE, inside=[sys.executable, "-c", REAPS_LATE])
    assert found == ("9\n" if tells_of_reaped() else "255\n")


def tells_of_reaped() -> bool:
    """Return whether the kernel keeps the exit code of what was reaped (Linux 6.15)."""
    with subprocess.Popen(["sh", "-c", "exit 9"]) as process:
        pidfd = os.pidfd_open(process.pid)
        process.wait()
        try:
            return read_exit_code(process.pid, pidfd) == 9
        finally:
            os.close(pidfd)


WITH_CGROUP = """
from limpet.engine.starters.oci.cgroups import make_lines
from tests.starters.oci import processes_of
load_busybox(engine, home / "image", needs_root=False)
sandbox = engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler="runc")
one = engine.create_container(config("one", "trap 'exit 5' TERM; while :; do sleep 0.05; done"), sandbox, id="one")
one.start()
processes = processes_of(str(home / "state"), "one")
made = f"0::/{os.path.basename(os.environ['PLACE'])}/{processes.cgroup}"
assert made in processes.cgroups and made in make_lines(processes.cgroup), processes
one.pause()
one.resume()
assert one.measure().cpu_ns > 0, one.measure()
print(one.stop(20).exit_code)
sandbox.remove(force=True)
engine.close()
"""


@with_ids
def test_cgroups_that_a_user_may_make_are_known_and_removed(home: str) -> None:
    """As systemd gives them to users: runc makes one there, by which containers are paused and go on; none is left."""
    require_tools(*TOOLS)
    unified = next((each for each in UNIFIED if os.path.exists(f"{each}/cgroup.procs")), "")
    if not unified:
        pytest.skip("there is no cgroup v2 here")
    place = tempfile.mkdtemp(prefix="limpet-test-", dir=unified)
    try:
        os.mkdir(f"{place}/engine")
        for path in (place, f"{place}/engine"):
            for each in (path, f"{path}/cgroup.procs", f"{path}/cgroup.subtree_control"):
                os.chown(each, 65534, 65534)
        enter = f'export PLACE={place}; echo $$ > {place}/engine/cgroup.procs; exec unshare --mount sh -ec "$0" sh "$@"'
        alone = 'mount -t tmpfs none /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'
        assert run(home, WITH_CGROUP, ["sh", "-ec", enter, alone]).split() == ["5"]
        assert [each.name for each in os.scandir(place) if each.is_dir()] == ["engine"]
    finally:
        Path(place, "cgroup.kill").write_text("1")
        wait_until(lambda: "populated 0" in Path(place, "cgroup.events").read_text(), "its processes to end")
        for path, _, _ in os.walk(place, topdown=False):
            os.rmdir(path)


UNIFIED = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
"""Where cgroup v2 may be mounted."""


NO_KEYS = """
import ctypes, platform
libc, number, add = ctypes.CDLL(None), 0, {"x86_64": 248, "aarch64": 217}[platform.machine()]
load_busybox(engine, home / "image", needs_root=False)
sandbox = engine.create_sandbox({"metadata": {"name": "a"}}, runtime_handler="runc")
before = engine.create_container(config("before", "sleep 1000"), sandbox)
before.start()
while libc.syscall(add, b"user", f"{number}".encode(), b"x", 1, -2) != -1:  # in the keyring of this process
    number += 1
for begin in (engine.create_container(config("one", "true"), sandbox).start, lambda: before.execute(["true"])):
    try:
        begin()
    except errors.StartError as error:
        print(error)
before.stop(0)
engine.close()
"""
NO_NAMESPACES = """
load_busybox(engine, home / "image", needs_root=False)
sandbox = engine.create_sandbox({"metadata": {"name": "a"}}, runtime_handler="runc")
pathlib.Path("/proc/sys/user/max_net_namespaces").write_text("0")
try:
    engine.create_container(config("one", "true"), sandbox).start()
except errors.StartError as error:
    print(error)
engine.close()
"""


def test_no_more_keys(home: str) -> None:
    """runc makes a keyring for each container and each command, and says that a disk is full: the limit is named."""
    require_tools(*TOOLS)
    if not os.path.exists("/proc/key-users"):
        pytest.skip("this kernel has no keyrings")
    lines = run(home, NO_KEYS).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.search(
            "no more keys.* user [0-9]+ has [0-9]+ of [0-9]+ keys, and .* /proc/sys/kernel/keys/maxkeys", line
        )


def test_no_more_namespaces(home: str) -> None:
    """Of its beginnings runc says last that they have ended, and before that why."""
    require_tools(*TOOLS)
    (line,) = run(home, NO_NAMESPACES, inside=["unshare", "--user", "--map-root-user"]).splitlines()
    assert re.search("failed to unshare .*: no more namespaces; raise .* /proc/sys/user/max_", line)
