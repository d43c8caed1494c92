"""Sandboxes whose network CNI plugins make: a plugin that tells what it was asked, and Debian's own."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from limpet import Engine, errors
from limpet.engine.starters.oci import OciStarter
from limpet.engine.starters.oci.cni import end_left
from limpet.schema.sandbox_status import SandboxReason, SandboxState, stop_sandbox
from tests.conftest import EngineProcess, is_running, read_output, wait_until
from tests.starters.oci import config, end_everything, load_busybox

PLUGIN = """#!/bin/sh
[ -e "{directory}/$CNI_COMMAND.sh" ] && . "{directory}/$CNI_COMMAND.sh"
echo "$CNI_COMMAND ${{0##*/}} $CNI_IFNAME $(grep -c prevResult)" >> {directory}/asked
[ -e "{directory}/fails-$CNI_COMMAND" ] && {{ echo '{{"code": 11, "msg": "no such luck"}}'; exit 1; }}
[ $CNI_COMMAND = ADD ] && echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "192.0.2.7/24"}}]}}'
exit 0
"""
POD = {"metadata": {"name": "pod"}, "hostname": "pod-one"}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root's sandboxes get networks from plugins")


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """Two plugins in a row, which note down what they are asked."""
    directory = tmp_path / "plugins"
    directory.mkdir()
    for name in ("first", "second"):
        (directory / name).write_text(PLUGIN.format(directory=directory))
        (directory / name).chmod(0o755)
    (tmp_path / "net.d").mkdir()
    conflist = {"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "first"}, {"type": "second"}]}
    (tmp_path / "net.d" / "10-n.conflist").write_text(json.dumps(conflist))
    return directory


@pytest.fixture(autouse=True)
def cleaned(state_dir: str) -> Iterator[None]:
    yield
    end_everything(state_dir)


def open_with(state_dir: str, plugins: Path, timeout: float = 3) -> Engine:
    cni = str(plugins.parent / "net.d")
    starter = OciStarter("runc", timeout=timeout, cni=cni, cni_plugins=str(plugins))
    return Engine.open(state_dir, runtimes={"runc": starter})


def asked(plugins: Path) -> list[str]:
    path = plugins / "asked"
    return path.read_text().splitlines() if path.exists() else []


ADDED = ["ADD first eth0 0", "ADD second eth0 1"]
DELETED = ["DEL second eth0 1", "DEL first eth0 1"]


def test_a_network_is_made_and_removed(state_dir: str, plugins: Path, tmp_path: Path) -> None:
    """Each plugin is asked in its turn; address and name are the sandbox's; DEL is asked once, backwards."""
    with open_with(state_dir, plugins) as engine:
        load_busybox(engine, tmp_path / "image")
        sandbox = engine.create_sandbox(POD, id="pod", runtime_handler="runc")
        assert asked(plugins) == ADDED
        assert sandbox.status.addresses == ("192.0.2.7",)
        container = engine.create_container(config("one", "grep pod-one /etc/hosts"), sandbox)
        container.start()
        container.wait(20)
        assert read_output(container, 0) == ["192.0.2.7\tpod-one"]
        host = {"security_context": {"namespace_options": {"network": "NODE"}}}
        other = engine.create_sandbox({"metadata": {"name": "host"}, "linux": host}, runtime_handler="runc")
        other.remove()
        sandbox.remove(force=True)
    assert asked(plugins) == [*ADDED, *DELETED]


def test_relative_directories(state_dir: str, plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of where the starter was made, though plugins work elsewhere, and so may the host program."""
    monkeypatch.chdir(plugins.parent)
    starter = OciStarter("runc", cni="net.d", cni_plugins="none::plugins")
    monkeypatch.chdir("/")
    with Engine.open(state_dir, runtimes={"runc": starter}) as engine:
        engine.create_sandbox(POD, id="pod", runtime_handler="runc").remove()
    assert asked(plugins) == [*ADDED, *DELETED]


def test_what_fails_is_repeated(state_dir: str, plugins: Path) -> None:
    """An ADD that fails makes nothing, and is taken back; a DEL that fails keeps the sandbox until it succeeds."""
    with open_with(state_dir, plugins) as engine:
        (plugins / "fails-ADD").touch()
        with pytest.raises(errors.UnsupportedError, match="first ADD failed: no such luck"):
            engine.create_sandbox(POD, id="pod", runtime_handler="runc")
        assert asked(plugins)[-2:] == ["DEL second eth0 0", "DEL first eth0 0"]
        assert list(engine.store.sandbox_ids) == []
        (plugins / "fails-DEL").touch()
        with pytest.raises(errors.UnsupportedError, match=r"and then: .*second DEL failed"):
            engine.create_sandbox(POD, id="pod", runtime_handler="runc")
        assert engine.get_sandbox("pod").state is SandboxState.NOTREADY
        with pytest.raises(errors.ResourcesError, match="DEL failed"):
            engine.get_sandbox("pod").delete()
        (plugins / "ADD.sh").write_text("echo nonsense; exit 0")
        (plugins / "fails-ADD").unlink()
        with pytest.raises(errors.UnsupportedError, match="no JSON"):
            engine.create_sandbox({"metadata": {"name": "other"}}, id="other", runtime_handler="runc")
    (plugins / "fails-DEL").unlink()
    with open_with(state_dir, plugins) as engine:  # whose recovery repeats it
        assert not Path(state_dir, "sandboxes/pod/network.json").exists()
        for name in ("pod", "other"):
            engine.get_sandbox(name).delete()


def test_plugins_know_a_sandbox_by_an_id_of_its_own(state_dir: str, plugins: Path, tmp_path: Path) -> None:
    """Of characters that all of them take, and another one in each state directory: they keep leases by it."""
    ids = plugins / "ids"
    for command in ("ADD", "DEL"):
        (plugins / f"{command}.sh").write_text(f"echo $CNI_CONTAINERID >> {ids}\n")
    keys = ("pod", "a/b", "-x", "ü x", "a" * 200)
    for path in (state_dir, str(tmp_path / "other")):
        with open_with(path, plugins) as engine:
            for key in keys:
                engine.create_sandbox(
                    {"metadata": {"name": key.replace("/", "")}}, id=key, runtime_handler="runc"
                ).delete()
    told = ids.read_text().split()
    assert len(told) == 2 * len(keys) * 4
    assert len(set(told)) == 2 * len(keys)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in told)


def test_a_copy_leaves_the_originals_network_alone(state_dir: str, plugins: Path, tmp_path: Path) -> None:
    """No plugin is asked for a copy of the state directory: what it would free is there, and used."""
    copy = str(tmp_path / "copy")
    with open_with(state_dir, plugins) as engine:
        sandbox = engine.create_sandbox(POD, id="pod", runtime_handler="runc")
        shutil.copytree(state_dir, copy, ignore=lambda *_: {"engine.sock"})
        with open_with(copy, plugins) as other:
            assert other.get_sandbox("pod").status.reason is SandboxReason.COPIED
            other.recover()
            other.get_sandbox("pod").remove()
        assert asked(plugins) == ADDED
        sandbox.remove()
    assert asked(plugins) == [*ADDED, *DELETED]


def test_killed_amid_it(state_dir: str, plugins: Path, engine_process: Callable[[str], EngineProcess]) -> None:
    """What a plugin was asked for is taken back by the next engine, and made again; without plugins that is refused."""
    (plugins / "ADD.sh").write_text("echo amid >> " + str(plugins / "asked") + "; sleep 1")
    process = engine_process(f"""
from limpet import OciStarter
options = {{"cni": {str(plugins.parent / "net.d")!r}, "cni_plugins": {str(plugins)!r}}}
engine = Engine.open(state_dir, runtimes={{"runc": OciStarter("runc", **options)}})
engine.create_sandbox({POD!r}, id="pod", runtime_handler="runc")
""")
    wait_until(lambda: asked(plugins), "a plugin to be asked")
    process.kill()
    (plugins / "ADD.sh").unlink()
    with Engine.open(state_dir, runtimes={"runc": OciStarter("runc")}) as engine:
        assert engine.get_sandbox("pod").status.addresses == ()
        engine.get_sandbox("pod").stop()
        with pytest.raises(errors.ResourcesError, match="with `cni`"):
            engine.get_sandbox("pod").delete()
    with open_with(state_dir, plugins) as engine:
        engine.get_sandbox("pod").delete()
    assert [line for line in asked(plugins) if line.startswith("DEL")] == ["DEL second eth0 0", "DEL first eth0 0"]


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_killed_while_it_hangs(
    state_dir: str, plugins: Path, tmp_path: Path, engine_process: Callable[[str], EngineProcess], command: str
) -> None:
    """The next engine ends the plugin with its children before it asks for anything; a copy's engine does not.

    Also the one whose parent has ended.
    """
    pids = tmp_path / "pids"
    # It reads what it is asked first, as each does: by then it is written down which process it is.
    (plugins / f"{command}.sh").write_text(
        f"cat >/dev/null; (sleep 1000 & echo $! > {pids}.new); sleep 1000 & echo $$ $! >> {pids}.new;"
        f" mv {pids}.new {pids}; wait"
    )
    process = engine_process(f"""
from limpet import OciStarter
options = {{"cni": {str(plugins.parent / "net.d")!r}, "cni_plugins": {str(plugins)!r}}}
engine = Engine.open(state_dir, runtimes={{"runc": OciStarter("runc", **options)}})
engine.create_sandbox({POD!r}, id="pod", runtime_handler="runc").remove()
""")
    wait_until(pids.exists, "a plugin to hang")
    process.kill()
    hung = [int(pid) for pid in pids.read_text().split()]
    shutil.copytree(f"{state_dir}/sandboxes/pod", tmp_path / "copy")
    end_left(str(tmp_path / "copy"))
    assert all(map(is_running, hung))
    (plugins / f"{command}.sh").unlink()
    with open_with(state_dir, plugins) as engine:
        assert not any(map(is_running, hung))
        if "pod" in engine.store.sandbox_ids:
            engine.get_sandbox("pod").delete()
    assert not Path(state_dir, "sandboxes/pod").exists()
    assert asked(plugins)[-1].startswith("DEL first")


def test_killed_before_it_is_written_down_which_process_a_plugin_is(
    state_dir: str, plugins: Path, tmp_path: Path, engine_process: Callable[[str], EngineProcess]
) -> None:
    """One that hangs before it reads is ended by the next engine; a fork of the host's, which has that file, is not."""
    pids, fork = tmp_path / "pids", tmp_path / "fork"
    (plugins / "ADD.sh").write_text(f"sleep 1000 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait")
    engine_process(f"""
from pathlib import Path
from limpet import OciStarter
from limpet.engine.starters.oci import cni
from tests.conftest import wait_until

def fork_and_die(*_):
    wait_until(Path({str(pids)!r}).exists, "a plugin to hang")
    pid = os.fork()
    if not pid:
        time.sleep(1000)
    Path({str(fork)!r}).write_text(str(pid))
    os.kill(os.getpid(), signal.SIGKILL)

cni.identify = fork_and_die
options = {{"cni": {str(plugins.parent / "net.d")!r}, "cni_plugins": {str(plugins)!r}}}
engine = Engine.open(state_dir, runtimes={{"runc": OciStarter("runc", **options)}})
engine.create_sandbox({POD!r}, id="pod", runtime_handler="runc")
""").wait()
    forked, hung = int(fork.read_text()), [int(pid) for pid in pids.read_text().split()]
    (plugins / "ADD.sh").unlink()
    try:
        with open_with(state_dir, plugins) as engine:
            assert not any(map(is_running, hung))
            assert is_running(forked)
            engine.get_sandbox("pod").delete()
    finally:
        os.kill(forked, signal.SIGKILL)
    assert asked(plugins)[-1].startswith("DEL first")


RUBBISH = {
    "words": "echo nonsense",
    "nothing": ":",
    "a list": "echo '[]'",
    "other addresses": """echo '{"ips": "192.0.2.7/24"}'""",
    "no address": """echo '{"ips": [{"address": "192.0.2.7/24 evil\\n"}]}'""",
    "half a character": """echo '{"ips": [], "dns": "\\ud800"}'""",
    "bytes": "head -c 3000000 /dev/urandom",
    "a file that is too long": """echo '{"ips": []'; yes ' ' | head -n 1500000; echo '}'""",
    "an address and a line": """echo '{"ips": [{"address": "fe80::1%x\nevil/64"}]}'""",
    "killed": "kill -9 $$",
}


def test_rubbish_is_taken_back(state_dir: str, plugins: Path) -> None:
    """Whatever a plugin answers, or if somebody kills it: no sandbox is left, and DEL was asked of both."""
    with open_with(state_dir, plugins) as engine:
        for what, script in RUBBISH.items():
            (plugins / "ADD.sh").write_text(f"{script}\nexit 0\n")
            (plugins / "asked").write_text("")
            with pytest.raises(errors.UnsupportedError, match="CNI"):
                engine.create_sandbox(POD, id="pod", runtime_handler="runc")
            assert asked(plugins) == ["DEL second eth0 0", "DEL first eth0 0"], what
            assert list(engine.store.sandbox_ids) == []


@pytest.mark.parametrize("name", ["frist", "a\0b", "", "..", "../first", "x" * 300, "folder"])
def test_a_plugin_that_is_none_is_told_before_any_is_asked(state_dir: str, plugins: Path, name: str) -> None:
    """It is mistyped in the configuration, or cannot be a program: no sandbox waits for its DEL for ever."""
    (plugins / "folder").mkdir()
    conflist = {"name": "n", "plugins": [{"type": "first"}, {"type": name}]}
    (plugins.parent / "net.d" / "10-n.conflist").write_text(json.dumps(conflist))
    with open_with(state_dir, plugins) as engine:
        with pytest.raises((errors.UnsupportedError, errors.InvalidInputError), match=r"^CNI: .*plugin"):
            engine.create_sandbox(POD, id="pod", runtime_handler="runc")
        assert list(engine.store.sandbox_ids) == []
    assert asked(plugins) == []


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"name": None}, "name None is none"),
        ({"name": ""}, "name '' is none"),
        ({"name": "a b"}, "name 'a b' is none"),
        ({"name": ["n"]}, "name .* is none"),
        ({"cniVersion": None}, "cniVersion None is none"),
        ({"cniVersion": 1.0}, "cniVersion 1.0 is none"),
        ({"cniVersion": "1"}, "cniVersion '1' is none"),
        ({"cniVersion": "0.2.0"}, "cniVersion '0.2.0' is too old; 0.3.0 or newer is needed"),
        ({"plugins": []}, "it lists no plugins"),
    ],
)
def test_a_configuration_that_is_none(state_dir: str, plugins: Path, changed: Mapping[str, Any], why: str) -> None:
    """No plugin is asked; results before version 0.3.0 would be taken for those without an address."""
    conflist: dict[str, Any] = {"cniVersion": "0.3.0", "name": "n", "plugins": [{"type": "first"}]}
    path = plugins.parent / "net.d" / "10-n.conflist"
    with open_with(state_dir, plugins) as engine:
        path.write_text(json.dumps({**conflist, **changed}))
        with pytest.raises(errors.InvalidInputError, match=rf"^CNI: .*10-n.conflist' is no network's.*{why}"):
            engine.create_sandbox(POD, id="pod", runtime_handler="runc")
        assert list(engine.store.sandbox_ids) == []
        assert asked(plugins) == []
        path.write_text(json.dumps(conflist))
        engine.create_sandbox(POD, id="pod", runtime_handler="runc")
        engine.get_sandbox("pod").remove(force=True)


def test_what_a_plugin_says_stays_in_its_line(state_dir: str, plugins: Path) -> None:
    """In an error and in a log: no line after it is another's, and no terminal does what it says."""
    (plugins / "answer").write_text(json.dumps({"code": 7, "msg": "no\nway \x1b[31m"}))
    (plugins / "ADD.sh").write_text(f"cat {plugins}/answer; exit 1")
    with open_with(state_dir, plugins) as engine:
        with pytest.raises(errors.UnsupportedError, match=r"failed: no\\nway \\x1b\[31m$"):
            engine.create_sandbox(POD, id="pod", runtime_handler="runc")
        assert list(engine.store.sandbox_ids) == []


def test_a_plugin_that_cannot_be_executed(state_dir: str, plugins: Path) -> None:
    """The one before it has made something: that is taken back once the plugin is mended, and all is told till then."""
    (plugins / "second").write_bytes(b"\x01garbage")
    with open_with(state_dir, plugins) as engine:
        why = "second' cannot be executed: Exec format error"
        with pytest.raises(errors.UnsupportedError, match=f"^CNI: .*{why}; and then: .*{why}; its network stays"):
            engine.create_sandbox(POD, id="pod", runtime_handler="runc")
        shutil.copy(plugins / "first", plugins / "second")
        engine.get_sandbox("pod").delete()
    assert asked(plugins) == ["ADD first eth0 0", "DEL second eth0 0", "DEL first eth0 0"]


def test_a_configuration_and_a_result_of_a_megabyte(state_dir: str, plugins: Path) -> None:
    """What was written down of them together can be read again, so the sandbox can be removed."""
    conflist = {"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "first", "much": "x" * 1_000_000}]}
    (plugins.parent / "net.d" / "10-n.conflist").write_text(json.dumps(conflist))
    (plugins / "result").write_text(json.dumps({"ips": [], "much": "y" * 1_000_000}))
    (plugins / "ADD.sh").write_text(f"cat {plugins}/result; exit 0")
    with open_with(state_dir, plugins) as engine:
        engine.create_sandbox(POD, id="pod", runtime_handler="runc").remove(force=True)
        assert list(engine.store.sandbox_ids) == []
    assert asked(plugins) == ["DEL first eth0 1"]


HANGS = 'case $CNI_NETNS in */stuck*) echo $$ >> "{pids}"; sleep 1000 & wait;; esac\n'
"""For sandboxes whose id begins with `stuck`, with a child of its own that holds its output."""


@pytest.mark.long
def test_a_plugin_that_hangs(state_dir: str, plugins: Path, tmp_path: Path) -> None:
    """It is ended at its deadline with its children, and others come and go meanwhile.

    So they do while the next engine, whose plugin hangs for several sandboxes at once, repeats DEL: that waits for one
    deadline and not for each. Once the plugin works again all are freed.
    """
    pids = tmp_path / "pids"

    def count_hung() -> int:
        return len(pids.read_text().split()) if pids.exists() else 0

    stuck = [f"stuck-{number}" for number in range(5)]
    with open_with(state_dir, plugins, timeout=6) as engine, ThreadPoolExecutor() as threads:
        for key in stuck:
            engine.create_sandbox({"metadata": {"name": key}}, id=key, runtime_handler="runc")
        (plugins / "DEL.sh").write_text(HANGS.format(pids=pids))
        held = threads.submit(engine.get_sandbox("stuck-0").delete)
        wait_until(lambda: count_hung() == 1, "DEL to hang")
        (plugins / "DEL.sh").unlink()
        (plugins / "ADD.sh").write_text(HANGS.format(pids=pids))
        made = threads.submit(engine.create_sandbox, POD, id="stuck-x", runtime_handler="runc")
        wait_until(lambda: count_hung() == 2, "ADD to hang")
        engine.create_sandbox({"metadata": {"name": "other"}}, id="other", runtime_handler="runc").delete()
        assert not held.done(), "six seconds are not over"
        with pytest.raises(errors.ResourcesError, match="second DEL failed: it did not end in time"):
            held.result()
        with pytest.raises(errors.UnsupportedError, match="first ADD failed: it did not end in time"):
            made.result()
        assert "stuck-x" not in engine.store.sandbox_ids
        for key in stuck:
            engine.store.update_sandbox(key, lambda old: stop_sandbox(old, SandboxReason.STOPPED, at=1, message=""))
    (plugins / "DEL.sh").write_text(HANGS.format(pids=pids))
    began = time.monotonic()
    with open_with(state_dir, plugins, timeout=3) as engine:
        assert time.monotonic() - began < 12, "five deadlines are not waited for, one after the other"
        (plugins / "DEL.sh").unlink()
        engine.recover()
        assert not list(Path(state_dir, "sandboxes").glob("*/network.json"))
    assert count_hung() == 7
    for pid in pids.read_text().split():
        assert not os.path.exists(f"/proc/{pid}")


def test_del_that_fails_after_a_crash(
    state_dir: str, plugins: Path, engine_process: Callable[[str], EngineProcess]
) -> None:
    """The engine is killed amid DEL; that is repeated by each engine after it until it succeeds, and then no more."""
    (plugins / "DEL.sh").write_text("echo amid >> " + str(plugins / "asked") + "; sleep 2")
    process = engine_process(f"""
from limpet import OciStarter
options = {{"cni": {str(plugins.parent / "net.d")!r}, "cni_plugins": {str(plugins)!r}}}
engine = Engine.open(state_dir, runtimes={{"runc": OciStarter("runc", **options)}})
engine.create_sandbox({POD!r}, id="pod", runtime_handler="runc").stop()
""")
    wait_until(lambda: "amid" in asked(plugins), "a plugin to be asked")
    process.kill()
    (plugins / "DEL.sh").unlink()
    (plugins / "fails-DEL").touch()
    for _ in range(2):
        with open_with(state_dir, plugins) as engine:
            assert engine.get_sandbox("pod").state is SandboxState.NOTREADY
            assert Path(state_dir, "sandboxes/pod/network.json").exists()
    (plugins / "fails-DEL").unlink()
    for _ in range(2):
        with open_with(state_dir, plugins) as engine:
            assert not Path(state_dir, "sandboxes/pod/network.json").exists()
    # The killed engine's plugin tells of itself at any time, and with 0 if it got no input.
    said = [line for line in asked(plugins) if line.startswith("DEL") and line != "DEL second eth0 0"]
    outlived, told = ["DEL second eth0 1"], ["DEL second eth0 1"] * 2 + DELETED
    assert said in (told, outlived + told, told + outlived)


@pytest.mark.skipif(not os.path.exists("/usr/lib/cni/ptp"), reason="Debian's CNI plugins are not installed")
def test_debians_plugins(state_dir: str, tmp_path: Path) -> None:
    """A container has an address of its own, reaches the host by it, and its end is free again afterwards."""
    (tmp_path / "net.d").mkdir()
    ipam = {"type": "host-local", "subnet": "198.51.100.0/28", "dataDir": str(tmp_path / "ipam")}
    conflist = {"cniVersion": "1.0.0", "name": "limpet-test", "plugins": [{"type": "ptp", "ipam": ipam}]}
    (tmp_path / "net.d" / "10.conflist").write_text(json.dumps(conflist))
    starter = OciStarter("runc", cni=str(tmp_path / "net.d"))
    with Engine.open(state_dir, runtimes={"runc": starter}) as engine:
        load_busybox(engine, tmp_path / "image")
        try:
            sandbox = engine.create_sandbox(POD, runtime_handler="runc")
        except errors.UnsupportedError as error:
            pytest.skip(str(error))
        (address,) = sandbox.status.addresses
        container = engine.create_container(config("one", "busybox ip addr; sleep 1000"), sandbox)
        container.start()
        wait_until(lambda: address in "".join(read_output(container, 0)), "its address")
        assert (tmp_path / "ipam" / "limpet-test" / address).exists()
        assert (
            subprocess.run(
                ["busybox", "ping", "-c", "1", "-W", "2", address], capture_output=True, check=False
            ).returncode
            == 0
        )
        sandbox.remove(force=True, timeout=0)
        assert not (tmp_path / "ipam" / "limpet-test" / address).exists()
