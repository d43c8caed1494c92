"""What becomes of sandboxes: after a reboot, in a copy, in another pid namespace, of an older record, after a kill."""

import os
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Engine, Store, errors, recover
from limpet.engine.inspection import Snapshot
from limpet.engine.inspection.dry_run import predict_recovery
from limpet.recovery.host import read_boot_id
from limpet.recovery.report import Report
from limpet.schema import ProcessIdentity, Status
from limpet.schema.layout import MARKER_FILE
from limpet.schema.sandbox_status import SandboxReason, SandboxState, SandboxStatus
from tests.conftest import EngineProcess, is_running
from tests.engine_lives import LIVE
from tests.records import metadata, sandbox
from tests.recovery.test_crash_windows import DIE
from tests.recovery.test_world import in_namespace

Start = Callable[[str], EngineProcess]
HELD = {"namespaces": {"network": "/run/netns/a"}, "addresses": ["10.0.0.7"]}


def told(report: Report) -> dict[str, tuple[str, str]]:
    """Return the rule and the state of each sandbox that a report tells of."""
    return {one.id: (one.rule, one.state) for one in report.sandboxes}


def of_boot(boot_id: str) -> Callable[[SandboxStatus], SandboxStatus]:
    return lambda old: replace(old, boot_id=boot_id)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_reboot_makes_a_sandbox_not_ready(state_dir: str, tmp_path: Path) -> None:
    """Under another boot id it is NOTREADY at the first opening, for good, and the report tells it once."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a", **HELD)  # type: ignore[arg-type]
        engine.create_sandbox({"metadata": {"name": "b"}}, id="b").stop()
        stopped = engine.get_sandbox("b").status
    fake = tmp_path / "boot_id"
    fake.write_text("11111111-2222-3333-4444-555555555555\n")
    script = textwrap.dedent(f"""
        from limpet.engine import Engine, errors
        with Engine.open({state_dir!r}) as engine:
            (one,) = engine.recovery.sandboxes
            status = engine.get_sandbox("a").status
            print(one.id, one.rule, one.state, status.state.name, status.reason, status.addresses[0])
            try: engine.create_container({{"metadata": {{"name": "c"}}, "image": {{"image": "host"}}, "command": ["true"]}}, "a")
            except errors.InvalidStateError: print("refused")
            print(len(engine.recover().sandboxes))
    """)  # noqa: E501
    words = in_namespace(f"mount --bind {fake} /proc/sys/kernel/random/boot_id", script, "-m").split()
    assert words == ["a", "sandbox-rebooted", "NOTREADY", "NOTREADY", "Rebooted", "10.0.0.7", "refused", "0"]
    with Engine.open(state_dir) as engine:  # and back, as after a restore: it stays so
        assert engine.get_sandbox("a").status.reason == SandboxReason.REBOOTED
        assert engine.get_sandbox("b").status == stopped
        assert not engine.recovery.sandboxes


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_without_a_boot_id_nothing_is_made_up(state_dir: str, tmp_path: Path) -> None:
    """It stays as it was recorded, also where no boot is recorded, and the report says that this is open."""
    with Engine.open(state_dir) as engine:
        for key, boot_id in (("a", read_boot_id() or ""), ("b", "")):
            engine.create_sandbox({"metadata": {"name": key}}, id=key).update(of_boot(boot_id))
        before = [engine.get_sandbox(key).status for key in "ab"]
    fake = tmp_path / "empty"
    fake.touch()
    script = textwrap.dedent(f"""
        from limpet.engine import Engine
        with Engine.open({state_dir!r}) as engine:
            print(*(one.rule for one in engine.recovery.sandboxes), engine.recovery.has_unresolved)
    """)
    words = in_namespace(f"mount --bind {fake} /proc/sys/kernel/random/boot_id", script, "-m").split()
    assert words == ["sandbox-no-boot-id", "sandbox-no-boot-id", "True"]
    with Store.open(state_dir) as store:
        assert [store.sandbox_status(key) for key in "ab"] == before


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_another_pid_namespace_is_no_reboot(state_dir: str) -> None:
    """The boot is the same: what it holds may be there, and nothing is said of it."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "a"}}, id="a", **HELD)  # type: ignore[arg-type]
        before = engine.get_sandbox("a").status
    script = textwrap.dedent(f"""
        from limpet.engine import Engine
        with Engine.open({state_dir!r}) as engine:
            print(len(engine.recovery.sandboxes), engine.get_sandbox("a").state.name)
    """)
    assert in_namespace("mount -t proc proc /proc", script, "-m", "-p", "-f").split() == ["0", "READY"]
    with Store.open(state_dir) as store:
        assert store.sandbox_status("a") == before


@pytest.fixture
def store(state_dir: str) -> Iterator[Store]:
    """A store with the sandbox "s"."""
    with Store.open(state_dir) as opened:
        opened.add_sandbox(sandbox())
        yield opened


def test_an_older_record_gets_the_present_boot_unless_its_containers_tell(store: Store) -> None:
    """A process of another boot alone shows a reboot; one of this boot, or none, does not."""
    here = read_boot_id() or ""
    for key, boots in (("a", []), ("b", ["then"]), ("c", ["then", here]), ("d", [here])):
        store.add_sandbox(replace(sandbox("s"), id=key, name=key))
        store.update_sandbox(key, of_boot(""))
        for n, boot_id in enumerate(boots):
            identity = ProcessIdentity(pid=1, start_ticks=1, boot_id=boot_id, pidfd_inode=1, pid_namespace=1)
            ended = Status(created_at=1, started_at=2, finished_at=3, identity=identity)
            store.add(replace(metadata(f"{key}{n}"), sandbox_id=key), ended)
    store.update_sandbox("s", of_boot("another"))
    report = recover(store)
    assert told(report) == {
        "a": ("sandbox-unrecorded", "READY"),
        "b": ("sandbox-rebooted", "NOTREADY"),
        "c": ("sandbox-unrecorded", "READY"),
        "d": ("sandbox-unrecorded", "READY"),
        "s": ("sandbox-rebooted", "NOTREADY"),
    }
    assert [store.sandbox_status(key).boot_id for key in "abcd"] == [here, "", here, here]
    assert not recover(store).sandboxes


@pytest.mark.parametrize(("is_link", "why"), [(False, "it is not a file"), (True, "it is a symbolic link")])
def test_a_damaged_directory_is_that_sandboxs_trouble(
    state_dir: str, caplog: pytest.LogCaptureFixture, *, is_link: bool, why: str
) -> None:
    """What is in its marker's place stops neither the opening nor another sandbox; the log says which, and why."""
    with Engine.open(state_dir) as engine:
        marker = Path(engine.create_sandbox({"metadata": {"name": "bad"}}, id="bad").metadata.root_dir, MARKER_FILE)
    marker.unlink()
    if is_link:
        marker.symlink_to("elsewhere")
    else:
        marker.mkdir()
    with Engine.open(state_dir) as engine:
        told = f"sandbox bad: what it holds cannot be set right now: bundle {marker.parent}: {str(marker)!r}: {why}"
        assert told in caplog.text
        engine.create_sandbox({"metadata": {"name": "good"}}, id="good").remove()
        with pytest.raises(errors.StateDirectoryError, match=why):
            engine.get_sandbox("bad").remove()
    assert os.path.lexists(marker)


def test_a_copy_gives_up_what_the_original_holds(state_dir: str) -> None:
    """Beside the live original: its sandbox with addresses is NOTREADY in the copy; one without is its own."""
    with Engine.open(state_dir) as engine:
        holding = engine.create_sandbox({"metadata": {"name": "a"}}, id="a", **HELD)  # type: ignore[arg-type]
        engine.create_sandbox({"metadata": {"name": "b"}}, id="b")
        copied = f"{state_dir}.copy"
        subprocess.run(["cp", "-a", state_dir, copied], check=True)
        with Snapshot.open(copied) as snapshot:
            assert told(predict_recovery(snapshot)) == {"a": ("sandbox-copied", "NOTREADY")}
        for _ in range(2):
            with Engine.open(copied) as other:
                assert other.get_sandbox("a").status.reason == SandboxReason.COPIED
                assert other.get_sandbox("b").state is SandboxState.READY
                if not other.list_sandboxes()[2:]:
                    other.create_sandbox({"metadata": {"name": "c"}}, id="c", addresses=["10.0.0.9"])
                assert other.get_sandbox("c").state is SandboxState.READY
        assert holding.state is SandboxState.READY


BUNDLE = "limpet.engine.lifecycle.bundle:Bundle"
SANDBOX = "limpet.engine.lifecycle.sandbox:Sandbox"
REMOVAL_OF_MANY = "limpet.engine.lifecycle.removal"
STARTER = "limpet.engine.starters.process.starter:ProcessStarter"
DRAFT = "limpet.engine.store.draft:Draft"
STORE = "limpet.engine.store.store:Store"

# Where an engine dies that removes a sandbox with one that runs and one that has ended; whether the sandbox is still
# READY then, and what is left of it and its containers once the next engine has recovered. None: it is gone.
REMOVAL = [
    (SANDBOX, "_write_stop", "before", SandboxState.READY, {"ended", "runs"}),
    (SANDBOX, "_write_stop", "after", SandboxState.NOTREADY, {"ended", "runs"}),
    (STARTER, "signal_many", "before", SandboxState.NOTREADY, {"ended", "runs"}),
    (STARTER, "signal_many", "after", SandboxState.NOTREADY, {"ended", "runs"}),
    (SANDBOX, "remove_ended", "before", SandboxState.NOTREADY, {"ended", "runs"}),
    (STARTER, "release_many", "before", SandboxState.NOTREADY, {"ended", "runs"}),
    (STARTER, "release_many", "after", SandboxState.NOTREADY, {"ended", "runs"}),
    (REMOVAL_OF_MANY, "remove_files", "before", SandboxState.NOTREADY, {"ended", "runs"}),
    (BUNDLE, "remove", "before", SandboxState.NOTREADY, {"ended", "runs"}),
    (REMOVAL_OF_MANY, "remove_files", "after", SandboxState.NOTREADY, {"ended", "runs"}),
    (DRAFT, "delete", "before", SandboxState.NOTREADY, {"ended", "runs"}),
    (DRAFT, "delete", "after", SandboxState.NOTREADY, {"ended", "runs"}),
    (SANDBOX, "remove_ended", "after", SandboxState.NOTREADY, set()),
    (SANDBOX, "_delete", "before", SandboxState.NOTREADY, set()),
    (STORE, "delete_sandbox", "before", SandboxState.NOTREADY, set()),
    (STORE, "delete_sandbox", "after", None, set()),
    (SANDBOX, "_delete", "after", None, set()),
]


@pytest.mark.parametrize(
    ("where", "name", "when", "state", "left"), REMOVAL, ids=[f"{when}-{name}" for _, name, when, *_ in REMOVAL]
)
def test_a_removal_cut_short(
    engine_process: Start, state_dir: str, where: str, name: str, when: str, state: SandboxState | None, left: set[str]
) -> None:
    """Nothing is orphaned: what is begun is gone on with, or can be repeated; nothing new comes in meanwhile."""
    process = engine_process(
        f"{DIE}{LIVE}"
        "e = make('ended', 'true'); e.start(); e.wait()\n"
        "r = make('runs', 'sleep', '1000'); r.start(); say(r.status.pid, sandbox.id)\n"
        f"die({where!r}, {name!r}, {when!r})\n"
        "sandbox.remove(force=True, timeout=5)\n"
    )
    pid, key = process.read()
    assert process.wait() == -9
    with Engine.open(state_dir) as engine:
        assert {one.id for one in engine.list()} == left
        if state is None:
            assert not engine.list_sandboxes()
        else:
            found = engine.get_sandbox(key)
            assert found.state is state
            if state is SandboxState.NOTREADY:
                if "runs" in left:  # the next engine goes on with the stop
                    assert engine.get("runs").wait(20).exit_code == 128 + 15
                with pytest.raises(errors.InvalidStateError):
                    engine.add_container({"metadata": {"name": "x"}, "image": {"image": "host"}}, key)
            assert found.remove(force=state is SandboxState.READY, timeout=5)
        assert not is_running(int(pid))
        assert (engine.list(), engine.list_sandboxes()) == ([], [])
        for folder in ("containers", "sandboxes"):
            assert os.listdir(f"{state_dir}/{folder}") == []
        assert not os.path.exists(f"{state_dir}/quarantine")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_sandbox_cut_short_while_it_is_made(engine_process: Start, state_dir: str, when: str) -> None:
    """Its row is there and READY; the directory is made by the next engine."""
    process = engine_process(
        f"{DIE}\nengine = Engine.open(state_dir); die({BUNDLE!r}, 'make', {when!r})\n"
        "engine.create_sandbox({'metadata': {'name': 'a'}}, id='a')"
    )
    assert process.wait() == -9
    with Engine.open(state_dir) as engine:
        assert engine.get_sandbox("a").state is SandboxState.READY
        assert Path(state_dir, "sandboxes", "a").is_dir()
        engine.get_sandbox("a").remove()
        assert os.listdir(f"{state_dir}/sandboxes") == []
