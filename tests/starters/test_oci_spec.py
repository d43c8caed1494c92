"""What a CRI config asks for is done by runc and crun, seen from within; what is not is listed by name."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from limpet import Engine, errors
from limpet.engine.starters.oci.namespaces import make_namespaces
from limpet.engine.starters.oci.seccomp import DEFAULT_PROFILES
from limpet.engine.starters.oci.tools import Tools, command_of
from limpet.schema.cri import ContainerConfig, ContainerMetadata, ImageSpec
from tests.conftest import find_processes, read_output, require_tools, wait_until
from tests.starters.oci import (
    TOOLS,
    config,
    each_runtime,
    processes_of,
)

SANDBOX = {
    "hostname": "pod-one",
    "dns_config": {"servers": ["192.0.2.53"]},
    "linux": {"sysctls": {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}},
}


def run(engine: Engine, runtime: str, script: str, context: dict[str, Any] | None = None, **fields: Any) -> list[str]:
    """Run a script to its end, and return the lines that it has written."""
    linux = {"linux": {"security_context": context}} if context else {}
    container = engine.create_container(config(f"c{time.monotonic_ns()}", script, **linux, **fields), runtime)
    container.start()
    container.wait(20)
    container.release()
    return read_output(container, 0)


@each_runtime
def test_users_and_groups(shared: Engine, runtime: str) -> None:
    """By number, and by the names of the image's own /etc/passwd and /etc/group."""
    asked = {"run_as_username": "web", "supplemental_groups": [2000]}
    assert run(shared, runtime, "id -u; id -g; id -G; echo $HOME", asked) == [
        "1000",
        "1001",
        "1001 1002 2000",
        "/home/web",
    ]
    strict = {**asked, "supplemental_groups_policy": "Strict"}
    assert run(shared, runtime, "id -G", strict) == ["1001 2000"]
    (groups,) = run(shared, runtime, "grep Groups: /proc/self/status", strict)
    assert groups.split() == ["Groups:", "1001", "2000"], "so that no program gives up what its group is forbidden"
    numbers = {"run_as_user": {"value": "12"}, "run_as_group": {"value": "34"}}
    assert run(shared, runtime, "id -u; id -g", numbers) == ["12", "34"]


@each_runtime
def test_an_empty_home_is_none(shared: Engine, runtime: str) -> None:
    """It is then the user's: runc would see to that alone, and crun leave it empty. Other variables may be empty."""
    empty = [{"key": name, "value": ""} for name in ("HOME", "OTHER")]
    script = "echo $HOME,${OTHER-unset}"
    assert run(shared, runtime, script, envs=empty) == ["/root,"]
    assert run(shared, runtime, script, {"run_as_username": "web"}, envs=empty) == ["/home/web,"]
    assert run(shared, runtime, script, {"run_as_user": {"value": "4711"}}, envs=empty) == ["/,"]
    assert run(shared, runtime, script, envs=[{"key": "HOME", "value": "/x"}]) == ["/x,unset"]


def capabilities(lines: list[str]) -> dict[str, int]:
    return {name: int(bits, 16) for name, _, bits in (line.partition(":\t") for line in lines)}


def test_what_no_process_can_have_is_refused(shared: Engine) -> None:
    """Told at the create, by name: runc would hang with too many groups, and say nothing of an oom score."""
    for linux, why in (
        ({"security_context": {"supplemental_groups": list(range(65_537))}}, "supplemental_groups: 65,537"),
        ({"resources": {"oom_score_adj": 1001}}, "oom_score_adj 1001"),
    ):
        with pytest.raises(errors.InvalidInputError, match=why):
            shared.create_container(config("never", "true", linux=linux), "runc")


@pytest.mark.parametrize(
    ("context", "why"),
    [
        ({"masked_paths": ["/etc/passwd", "/."]}, "masked_paths '/.': a path below / is needed"),
        ({"readonly_paths": [""]}, "readonly_paths '': a path below / is needed"),
        ({"namespace_options": {"network": "TARGET", "target_id": "x"}}, "namespace_options.network TARGET: only pid"),
        ({"namespace_options": {"ipc": "TARGET", "target_id": "x"}}, "namespace_options.ipc TARGET: only pid"),
        ({"namespace_options": {"pid": "TARGET"}}, "namespace_options.target_id is empty: give the id"),
        ({"run_as_user": {"value": str(2**31)}}, "user 2147483648: runc takes no number above 2147483647"),
        ({"run_as_user": {"value": "5"}, "run_as_group": {"value": str(2**31)}}, "^group 2147483648: runc"),
        ({"supplemental_groups": [1, 2**31]}, "supplemental group 2147483648: runc"),
    ],
)
def test_what_would_be_passed_over_is_refused(shared: Engine, context: dict[str, Any], why: str) -> None:
    """What both runtimes do not do and say nothing of, and what runc would say at the start."""
    with pytest.raises(errors.InvalidInputError, match=why):
        shared.create_container(config("never", "true", linux={"security_context": context}), "runc")


def test_crun_takes_all_ids(shared: Engine) -> None:
    """Those that runc does not, too."""
    most = 2**32 - 2
    context = {"run_as_user": {"value": str(most)}, "run_as_group": {"value": str(most)}, "supplemental_groups": [most]}
    assert run(shared, "crun", "id -u; id -G", context) == [str(most), str(most)]


@each_runtime
def test_a_privileged_one_sees_the_hosts_devices(shared: Engine, runtime: str) -> None:
    """All that the host has in /dev, and can make others; one that is not privileged has its own alone."""
    devices = [name for name in sorted(os.listdir("/dev")) if Path("/dev", name).is_block_device()]
    others = [name for name in ("kmsg", "fuse", "loop-control", "tty0") if Path("/dev", name).is_char_device()]
    names = [*devices[:3], *others]
    script = f"for n in {' '.join(names)}; do test -e /dev/$n && echo $n; done; echo end"
    seen = run(shared, runtime, script, {"privileged": True})
    assert seen == [*(name for name in names if name in seen or os.path.lexists(f"/dev/{name}")), "end"]
    assert run(shared, runtime, script) == ["end"]


@each_runtime
def test_capabilities_and_privileges(shared: Engine, runtime: str) -> None:
    """The default 14, some added and dropped, all, none; for another user ambient ones alone; no_new_privs."""
    script = "grep -e CapEff -e CapBnd -e CapAmb /proc/self/status"
    default = capabilities(run(shared, runtime, script))
    assert default["CapEff"] == default["CapBnd"] == 0xA80425FB
    changed = {"capabilities": {"add_capabilities": ["NET_ADMIN"], "drop_capabilities": ["cap_chown"]}}
    assert capabilities(run(shared, runtime, script, changed))["CapEff"] == (0xA80425FB | 1 << 12) & ~1
    assert capabilities(run(shared, runtime, script, {"capabilities": {"drop_capabilities": ["ALL"]}}))["CapBnd"] == 0
    user = {"run_as_user": {"value": "1000"}, "capabilities": {"add_ambient_capabilities": ["NET_BIND_SERVICE"]}}
    found = capabilities(run(shared, runtime, script, user))
    assert found["CapEff"] == found["CapAmb"] == 1 << 10
    assert run(shared, runtime, "grep NoNewPrivs /proc/self/status", {"no_new_privs": True}) == ["NoNewPrivs:\t1"]
    with pytest.raises(errors.InvalidInputError, match="add_capabilities 'FLY': no such capability"):
        run(shared, runtime, "true", {"capabilities": {"add_capabilities": ["FLY"]}})


@each_runtime
def test_seccomp(shared: Engine, runtime: str, tmp_path: Path) -> None:
    """The installed profile, a file, or none; what is no profile is refused."""
    if not any(map(os.path.exists, DEFAULT_PROFILES)):
        (pytest.fail if "LIMPET_GATE" in os.environ else pytest.skip)("not installed: golang-github-containers-common")
    script = "grep Seccomp: /proc/self/status"
    assert run(shared, runtime, script) == ["Seccomp:\t0"]
    assert run(shared, runtime, script, {"seccomp": {"profile_type": "Unconfined"}}) == ["Seccomp:\t0"]
    assert run(shared, runtime, script, {"seccomp": {"profile_type": "RuntimeDefault"}}) == ["Seccomp:\t2"]
    profile = tmp_path / "profile.json"
    profile.write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
            }
        )
    )
    asked = {"seccomp": {"profile_type": "Localhost", "localhost_ref": str(profile)}}
    assert run(shared, runtime, "busybox mkdir /tmp/x 2>&1 || true", asked)[0].endswith("Operation not permitted")
    profile.write_text("[]")
    with pytest.raises(errors.InvalidInputError, match="is none"):
        run(shared, runtime, "true", asked)


@each_runtime
def test_the_root_and_the_paths(shared: Engine, runtime: str) -> None:
    """A root that is read-only, paths that are hidden or read-only, and both as they are by default."""
    assert run(shared, runtime, "echo x > /tmp/x; cat /tmp/x") == ["x"]
    assert "Read-only" in run(shared, runtime, "echo x > /tmp/x", {"readonly_rootfs": True})[0]
    hidden = run(shared, runtime, "cat /proc/timer_list | busybox wc -c; (echo x > /proc/sys/kernel/domainname) 2>&1")
    assert hidden[0] == "0"
    assert "Read-only" in hidden[1]
    own = {"masked_paths": ["/etc/passwd"], "readonly_paths": ["/tmp"]}
    said = run(shared, runtime, "cat /etc/passwd; (echo x > /tmp/x) 2>&1; echo end", own)
    assert said[-1] == "end"
    assert len(said) == 2
    assert "Read-only" in said[0]


@each_runtime
def test_mounts(shared: Engine, runtime: str, tmp_path: Path) -> None:
    """Files and directories of the host, read-only or not; what a mount leaves of /dev and /sys is usual."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("given\n")
    mounts = [
        {"container_path": "/work", "host_path": str(tmp_path / "data")},
        {"container_path": "/work/ro", "host_path": str(tmp_path / "data"), "readonly": True},
    ]
    (tmp_path / "data" / "ro").mkdir()
    script = "cat /work/file; echo new > /work/made; (echo x > /work/ro/y) 2>&1; test -c /dev/null && echo dev"
    said = run(shared, runtime, script, mounts=mounts)
    assert said[0] == "given"
    assert "Read-only" in said[1]
    assert said[2] == "dev"
    assert (tmp_path / "data" / "made").read_text() == "new\n"
    with pytest.raises(errors.InvalidInputError, match="host_path '/no/such' does not exist"):
        run(shared, runtime, "true", mounts=[{"container_path": "/work", "host_path": "/no/such"}])


@each_runtime
def test_namespaces_names_and_sysctls(shared: Engine, runtime: str) -> None:
    """Of its own: pid 1, a hostname, a loopback, sysctls; or the host's."""
    script = (
        "echo $$; hostname; grep nameserver /etc/resolv.conf; cat /proc/sys/net/ipv4/ip_forward;"
        " grep -c : /proc/net/dev"
    )
    assert run(shared, runtime, script) == ["1", "pod-one", "nameserver 192.0.2.53", "1", "1"]
    host = {"namespace_options": {"network": "NODE", "pid": "NODE", "ipc": "NODE"}}
    links = [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "uts", "ipc", "pid")]
    said = run(
        shared, runtime, "for n in net uts ipc pid; do ls -l /proc/self/ns/$n | grep -o '[a-z]*:.[0-9]*.$'; done", host
    )
    assert said == links


@each_runtime
def test_devices(shared: Engine, runtime: str) -> None:
    """A device of the host that is asked for can be read; one that is not cannot be made."""
    device = {"container_path": "/dev/given", "host_path": "/dev/full", "permissions": "rw"}
    assert run(shared, runtime, "busybox head -c 1 /dev/given | busybox wc -c", devices=[device]) == ["1"]
    for path in ("dev/given", "/dev/../given", "/", "/etc/passwd", "/bin", "/dev/ptmx"):
        with pytest.raises(errors.InvalidInputError, match=r"^devices\.container_path"):
            run(shared, runtime, "true", devices=[device | {"container_path": path}])
    said = run(shared, runtime, "busybox mknod /tmp/kmsg c 1 11 && cat /tmp/kmsg 2>&1 | busybox head -1")
    assert "not permitted" in said[0].lower()


@each_runtime
def test_limits(shared: Engine, runtime: str) -> None:
    """What the CRI limits is in the container's cgroup; a memory limit that ends it is told; oom_score_adj is set."""
    limits = {
        "memory_limit_in_bytes": str(32 << 20),
        "cpu_shares": "512",
        "cpu_quota": "50000",
        "cpu_period": "100000",
        "cpuset_cpus": "0",
        "oom_score_adj": "500",
        "unified": {"memory.high": "1"},
    }
    container = shared.create_container(
        config("limited", "cat /proc/self/oom_score_adj; sleep 1000", linux={"resources": limits}),
        runtime,
        id=f"limited-{runtime}",
    )
    status = container.start()
    assert status.resources is not None
    assert set(limits) - {"unified"} <= set(status.resources.applied)
    lines = processes_of(shared.store.directory.path, container.id).cgroups
    memory = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] in {"memory", ""})
    name = "memory/{}/memory.limit_in_bytes" if os.path.isdir("/sys/fs/cgroup/memory") else "{}/memory.max"
    if os.path.isdir("/sys/fs/cgroup/memory"):
        memory = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")
        assert status.resources.unapplied == {"unified": "this host's cgroups are of version 1"}
    assert Path("/sys/fs/cgroup", name.format(memory.lstrip("/"))).read_text() == f"{32 << 20}\n"
    assert read_output(container, 1) == ["500"]
    container.stop(0)
    container.release()
    hungry = shared.create_container(
        config("hungry", "busybox tail /dev/zero", linux={"resources": {"memory_limit_in_bytes": str(8 << 20)}}),
        runtime,
    )
    hungry.start()
    assert hungry.wait(30).exit_code == 137
    assert hungry.status.reason == "OOMKilled"


@each_runtime
def test_one_that_does_without_what_was_killed_has_completed(shared: Engine, runtime: str) -> None:
    """Its memory limit has ended another process than its first, which ended well, and nothing else is said."""
    script = "busybox tail /dev/zero; echo $?"
    asked = config("able", script, linux={"resources": {"memory_limit_in_bytes": str(8 << 20)}})
    able = shared.create_container(asked, runtime)
    able.start()
    status = able.wait(30)
    assert "137" in read_output(able, 0)
    assert (status.exit_code, status.reason, status.message) == (0, "Completed", "")


@each_runtime
def test_what_a_stop_ends_has_not_run_out_of_memory(shared: Engine, runtime: str) -> None:
    """One that had lost a process, and ran on until it was asked to stop; what the kernel did is told nevertheless."""
    asked = config(
        "stopped", "busybox tail /dev/zero; echo $?; sleep 1000",
        linux={"resources": {"memory_limit_in_bytes": str(8 << 20)}},
    )  # fmt: skip
    able = shared.create_container(asked, runtime)
    able.start()
    assert "137" in read_output(able, 1)
    status = able.stop(0)
    assert (status.exit_code, status.reason) == (137, "Error")
    assert re.match("it was asked to stop, and the kernel killed a process of it for want of memory", status.message)
    able.remove()


@pytest.fixture
def narrow_parent() -> Iterator[str]:
    """A cgroup with a memory limit, of version 1."""
    if not os.path.isdir("/sys/fs/cgroup/memory"):
        pytest.skip("with version 2 conmon is told of its own container alone")
    name = f"/limpet-test-{os.getpid()}"
    Path(f"/sys/fs/cgroup/memory{name}").mkdir()
    Path(f"/sys/fs/cgroup/memory{name}/memory.limit_in_bytes").write_text(str(32 << 20))
    yield name
    for path in Path("/sys/fs/cgroup").glob(f"*{name}"):
        path.rmdir()


@each_runtime
@pytest.mark.parametrize("has_conmon", [True, False])
def test_whose_process_was_killed_for_want_of_memory(
    shared: Engine, narrow_parent: str, runtime: str, has_conmon: bool
) -> None:
    """Where the limit of a cgroup above is reached conmon was told so of each container, and said so of all."""
    asked = {"metadata": {"name": "narrow"}, "linux": {"cgroup_parent": narrow_parent}}
    sandbox = shared.create_sandbox(asked, runtime_handler=runtime)
    beside = shared.create_container(config("beside", command=["/bin/sleep", "1000"]), sandbox)
    chosen = {"resources": {"oom_score_adj": 1000}}
    hungry = shared.create_container(config("hungry", "sleep 0.1; exec busybox tail /dev/zero", linux=chosen), sandbox)
    beside_pid = beside.start().pid
    hungry.start()
    if not has_conmon:
        os.kill(processes_of(shared.store.directory.path, hungry.id).monitor.pid, signal.SIGKILL)
    assert (hungry.wait(30).exit_code, hungry.status.reason) == (137, "OOMKilled")
    os.kill(beside_pid, signal.SIGKILL)
    assert (beside.wait(30).exit_code, beside.status.reason, beside.status.message) == (137, "Error", "")
    sandbox.remove(force=True)


@each_runtime
def test_what_is_not_done_is_listed(shared: Engine, runtime: str) -> None:
    """Each field by name, and `strict` refuses it; a config that asks for what is done has none."""
    asked = {
        "selinux_options": {"type": "t"},
        "apparmor": {"profile_type": "RuntimeDefault"},
        "namespace_options": {"userns_options": {"mode": "POD"}, "target_id": "other"},
    }
    mounts = [{"container_path": "/work", "image": {"image": "box:1"}}]
    wants = config("wants", "true", linux={"security_context": asked}, mounts=mounts, CDI_devices=[{"name": "a/b=c"}])
    found = shared.create_container(wants, runtime).status.unapplied
    names = {"selinux_options", "apparmor", "namespace_options.userns_options", "mounts.image"}
    names.add("namespace_options.target_id")
    assert set(found) == {*names, "CDI_devices"}
    with pytest.raises(errors.InvalidInputError, match="selinux_options"):
        shared.create_container({**wants, "metadata": {"name": "strict"}}, runtime, strict=True)
    shared.create_container(config("plain", "true"), runtime, strict=True)


TRY_DEVICE = """
(: < /dev/mine) 2>&1 | grep -q 'not permitted' || echo r
(: >> /dev/mine) 2>&1 | grep -q 'not permitted' || echo w
busybox mknod /work/node c $NUMBER 2>/dev/null && echo m
true
"""
DEVICES = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0), "ptmx": (5, 2),
    "pts": (136, 0), "console": (5, 1), "tun": (10, 200), "mem": (1, 1), "fuse": (10, 229),
}  # fmt: skip
OF_ALL = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts"}


@pytest.mark.parametrize("name", DEVICES)
@each_runtime
def test_permissions_of_devices_are_in_force_or_told(shared: Engine, runtime: str, name: str, tmp_path: Path) -> None:
    """Of some the runtimes let every container use them, and all can be made by who may make any."""
    number = DEVICES[name]
    path = str(tmp_path / name)
    os.mknod(path, 0o20666, os.makedev(*number))
    for permissions, drop in (("r", []), ("r", ["MKNOD"]), ("w", ["MKNOD"])):
        device = {"container_path": "/dev/mine", "host_path": path, "permissions": permissions}
        linux = {"security_context": {"capabilities": {"drop_capabilities": drop}}}
        script = TRY_DEVICE.replace("$NUMBER", "{} {}".format(*number))
        asked = config(f"{runtime}-{name}-{permissions}-{len(drop)}", script, devices=[device], linux=linux)
        container = shared.create_container(asked, runtime)
        container.start()
        container.wait(20)
        found, told = set(read_output(container, 0)), dict(container.status.unapplied)
        is_of_all = name in OF_ALL or (runtime, name) == ("crun", "console")
        if (runtime, name) != ("runc", "tun"):  # differs between its versions
            assert found == ({"r", "w"} if is_of_all else {permissions}) | ({"m"} if not drop else set())
            assert ("read and write" in told.get("devices.permissions", "")) is is_of_all
        assert found <= {*permissions} or set(told) == {"devices.permissions"}
        assert ("CAP_MKNOD" in told.get("devices.permissions", "")) is (not drop)


@each_runtime
def test_what_a_privileged_one_has_all_the_same_is_listed(shared: Engine, runtime: str) -> None:
    """As nothing is taken from it: by the name of each field that asks for less."""
    asked: dict[str, Any] = {
        "capabilities": {"drop_capabilities": ["ALL"]},
        "masked_paths": ["/etc/passwd"],
        "readonly_paths": ["/tmp"],
        "seccomp": {"profile_type": "RuntimeDefault"},
        "seccomp_profile_path": "runtime/default",
    }
    linux = {"security_context": {"privileged": True, **asked}}
    wants = config(f"less-{runtime}", "true", linux=linux, devices=[{"host_path": "/dev/full", "permissions": "r"}])
    found = shared.create_container(wants, runtime).status.unapplied
    assert set(found) == {*asked, "devices.permissions"}
    more = {"privileged": True, "capabilities": {"add_capabilities": ["KILL"]}}
    wants = config(f"more-{runtime}", "true", linux={"security_context": more})
    assert shared.create_container(wants, runtime).status.unapplied == {}


@each_runtime
def test_a_device_that_the_hosts_dev_has(shared: Engine, runtime: str) -> None:
    """Where that is mounted: it is there, and may be used."""
    mounts = [{"container_path": "/dev", "host_path": "/dev"}]
    asked = config(f"all-{runtime}", ": </dev/fuse && echo opened", mounts=mounts, devices=[{"host_path": "/dev/fuse"}])
    container = shared.create_container(asked, runtime)
    container.start()
    assert container.wait(20).exit_code == 0
    assert read_output(container, 1) == ["opened"]
    container.release()


@pytest.mark.parametrize("is_unified", [False, True])
def test_a_cgroup_namespace_where_all_controllers_are_of_cgroup_v2(is_unified: bool) -> None:
    """With cgroup v1 the runtimes mount the container's own cgroups, as these are on the host."""
    plain = ContainerConfig(metadata=ContainerMetadata(name="one"), image=ImageSpec(image="box:1"))
    types = [each["type"] for each in make_namespaces(plain, {}, is_unified=is_unified)]
    assert types == ["mount", "network", "uts", "ipc", "pid", *(["cgroup"] if is_unified else [])]


@each_runtime
def test_annotations_give_a_runtime_no_orders(shared: Engine, runtime: str) -> None:
    """crun would make a virtual machine of it, and fail; what is left out is said, and all else is in config.json."""
    orders = {"run.oci.handler": "krun", "org.systemd.property.CPUQuota": "1", "module.wasm.image/variant": "compat"}
    notes = {"note": "n", "x.run.oci.handler": "krun"}
    container = shared.create_container(config("orders", "true", annotations={**orders, **notes}), runtime)
    container.start()
    assert container.wait(20).exit_code == 0
    given = json.loads(Path(container.metadata.root_dir, "config.json").read_bytes())["annotations"]
    assert {name: value for name, value in given.items() if name != "limpet.marker"} == notes
    why = container.status.unapplied["annotations"]
    assert why == f"a runtime would take {', '.join(sorted(orders))} for an order"
    plain = shared.create_container(config("notes", "true", annotations=notes), runtime, strict=True)
    assert not plain.status.unapplied


@each_runtime
def test_a_shared_pid_namespace_leaves_nothing(shared: Engine, runtime: str) -> None:
    """Where it has the host's pids, all that it has started is ended with its release."""
    host = {"security_context": {"namespace_options": {"pid": "NODE"}}}
    container = shared.create_container(
        config("daemon", f"sleep 4712{os.getpid()} & exec sleep 0.3", linux=host), runtime
    )
    container.start()
    container.wait(20)
    container.release()
    assert find_processes("sleep", f"4712{os.getpid()}") == []


@each_runtime
def test_a_terminal_and_an_input(shared: Engine, runtime: str) -> None:
    """A terminal of its own, and an input that stays open; without either, end of file at once."""
    assert run(shared, runtime, "test -t 1 && echo tty; echo $TERM", tty=True) == ["tty\r", "xterm\r"]
    script = "read line && echo line || echo end"
    assert run(shared, runtime, script) == ["end"]
    container = shared.create_container(config(f"waits-{runtime}", script, stdin=True), runtime)
    container.start()
    time.sleep(0.5)
    assert container.status.pid
    container.stop(0)


@each_runtime
def test_namespaces_that_the_sandbox_holds(shared: Engine, runtime: str, tmp_path: Path) -> None:
    """A container joins them, and what they have of their own, such as a name, stays theirs."""
    sandbox = shared.create_sandbox({"metadata": {"name": f"holds-{runtime}"}, **SANDBOX}, runtime_handler=runtime)
    holder = subprocess.Popen(["unshare", "--net", "--ipc", "--uts", "sleep", "1000"])
    try:
        names = {"network": "net", "ipc": "ipc", "uts": "uts"}
        wait_until(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", "the namespaces")
        paths = {kind: f"/proc/{holder.pid}/ns/{name}" for kind, name in names.items()}
        shared.store.update_sandbox(sandbox.id, lambda old: replace(old, namespaces=paths))
        said = run(
            shared,
            sandbox.id,
            "for n in net ipc uts; do ls -l /proc/self/ns/$n | grep -o '[a-z]*:.[0-9]*.$'; done",
            {"namespace_options": {}},
        )
        assert said == [os.readlink(path) for path in paths.values()]
        (container,) = sandbox.containers()
        assert set(container.status.unapplied) == {"sandbox.sysctls"}
    finally:
        holder.kill()
        holder.wait()


PROPAGATION = """
import subprocess, sys
from pathlib import Path
from tests.starters.oci import RUNTIMES, busybox_engine, TOOLS, config, load_busybox, open_engine
directory, runtime = Path(sys.argv[1]), sys.argv[2]
shared = directory / "shared"
for path in (shared, directory / "private"):
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    subprocess.run(["mount", "--make-" + path.name, path], check=True)
    (path / "below").mkdir()
with open_engine(str(directory / "state")) as engine:
    load_busybox(engine, directory / "image")
    engine.create_sandbox({"metadata": {"name": "a"}}, id="a", runtime_handler=runtime)
    for name in ("shared", "private"):
        for kind in ("HOST_TO_CONTAINER", "BIDIRECTIONAL"):
            mount = {"container_path": "/work", "host_path": str(directory / name)}
            mount["propagation"] = "PROPAGATION_" + kind
            one = engine.create_container(config(name + kind, "sleep 1000", mounts=[mount]), "a")
            one.start()
            later = directory / name / "below"
            subprocess.run(["mount", "-t", "tmpfs", "none", later], check=True)
            (later / "later").touch()
            seen = one.execute(["ls", "/work/below"]).output
            subprocess.run(["umount", later], check=True)
            print(name, kind, seen == b"later\\n", "mounts.propagation" in one.status.unapplied)
            one.stop(0)
            one.release()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@each_runtime
def test_propagation(runtime: str, tmp_path: Path) -> None:
    """What is mounted later gets there from a shared mount; from a private one it does not, which is told."""
    require_tools("unshare", "mount", *TOOLS)
    command = ["unshare", "-m", "--propagation", "private", sys.executable, "-c", PROPAGATION, str(tmp_path), runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    is_apart = len(command_of(Tools().find(runtime))) > 1
    assert done.stdout.splitlines() == [
        "shared HOST_TO_CONTAINER True False",
        f"shared BIDIRECTIONAL True {is_apart}",
        "private HOST_TO_CONTAINER False True",
        "private BIDIRECTIONAL False True",
    ]
