"""Save state directories of the present revision as test data: `python -m tests.upgrade.make_states`.

It writes states/REVISION.tar.gz (every state of a container, then every kind of damage, each on rows of its own) and
states/REVISION-killed.tar.gz (its writer was killed: the newest commits are in the WAL alone), and beside each a JSON
file with what the same code reads from it before any recovery pass. No real process is named, and no real time kept.
"""

import gzip
import io
import itertools
import json
import os
import shutil
import signal
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import closing

from msgspec.structs import replace

from limpet import Store, recover
from limpet.engine.reconcile import recovery_pass
from limpet.engine.store import deadlines, draft
from limpet.recovery import Boot, Observation, Process
from limpet.schema import ImageManifest, ImageName, Metadata, ProcessIdentity, SandboxMetadata, Status
from limpet.schema.cri import LinuxContainerResources, parse_container_config, parse_pod_sandbox_config
from limpet.schema.revision import SCHEMA_REVISION
from limpet.schema.sandbox_status import SandboxStatus
from limpet.schema.seal import seal, sealed_columns
from limpet.schema.status import Resources
from tests.upgrade.saved import STATES, Said, read

NODES = ("local", "n2")
SECOND = 10**9
BEGIN = 1_700_000_000 * SECOND
LATER = 2 * BEGIN
"""In 2077: still to come when it is written."""
BOOT_ID = "00000000-1111-4222-8333-444444444444"
"""Of no machine: recovery says of each process that the machine was rebooted under it."""
STRANGE = "bell \a escape \x1b[31m line\n tab\t del \x7f \u202e \u00fc \u732b \U0001f41a \\ \" '"
IMAGE = ImageManifest(name=ImageName("host"))
LIMITS = Resources(
    requested=LinuxContainerResources(
        memory_limit_in_bytes=64 << 20, cpu_quota=50_000, cpu_period=100_000, unified={"pids.max": "20"}
    ),
    applied=("memory_limit_in_bytes", "unified"),
    unapplied={"cpu_quota": "no cpu controller here", "cpu_period": "no cpu controller here"},
)
CREATED = Status(created_at=BEGIN)
ENDED = Status(created_at=BEGIN, started_at=BEGIN + SECOND, finished_at=BEGIN + 5 * SECOND, reason="Completed")


def identity(pid: int) -> ProcessIdentity:
    return ProcessIdentity(
        pid=pid, start_ticks=100 + pid, boot_id=BOOT_ID, pidfd_inode=pid + 5, pid_namespace=4026531836
    )


def running(pid: int) -> Status:
    return Status(pid=pid, created_at=BEGIN, started_at=BEGIN + SECOND, identity=identity(pid))


def failed(exit_code: int, reason: str, message: str = "", pid: int = 0) -> Status:
    return replace(ENDED, exit_code=exit_code, reason=reason, message=message, identity=identity(pid) if pid else None)


STATUSES: dict[str, Status] = {
    "new": Status(),
    "created": CREATED,
    "created-limits": replace(CREATED, resources=LIMITS),
    "running": running(4001),
    "running-limits": replace(running(4002), resources=LIMITS),
    "running-anonymous": replace(running(4003), identity=None),
    "running-strange": replace(running(4004), reason="Strange", message=f"nul \0 {STRANGE}"),
    "running-unapplied": replace(running(4014), unapplied={"tty": f"none here {STRANGE}", "mounts": "no namespace"}),
    "running-stopping": replace(running(4015), stop_requested_at=BEGIN + 2 * SECOND, stop_deadline=BEGIN + 9 * SECOND),
    "stopped": replace(failed(137, "Error"), stop_requested_at=BEGIN + 2 * SECOND, stop_deadline=BEGIN + 4 * SECOND),
    "oom-killed": failed(137, "OOMKilled"),
    "running-paused": replace(running(4017), paused=True, expires_at=BEGIN + 3600 * SECOND),
    "running-extra": replace(running(4018), extra={"owner": STRANGE, "ports": [80, 443], "nested": {"a": None}}),
    "running-leased": replace(running(4019), expires_at=LATER, stop_requested_at=BEGIN, stop_deadline=LATER),
    "exited-0": replace(ENDED, identity=identity(4005), resources=LIMITS),
    "exited-3": failed(3, "Error"),
    "exited-137": failed(137, "Error", "ended by signal 9", 4006),
    "exited-minus-1": failed(-1, "Error", f"nul \0 {STRANGE}"),
    "start-error": replace(failed(128, "StartError", "no such program: '/bin/m\u00fcsli'"), started_at=0),
    "exit-unseen": failed(255, "Unknown", "", 4007),
    "rebooted": failed(255, "Rebooted", "", 4008),
    "released": replace(ENDED, released=True),
    "released-created": replace(CREATED, released=True),
    # From here on they are damaged later.
    "status-sum": failed(3, "Error", "", 4009),
    "status-sum-running": running(4010),
    "status-missing": running(4011),
    "status-not-utf8": failed(3, "Error", "soon damaged"),
    "resources-unreadable": replace(running(4012), resources=LIMITS),
    "metadata-sum": running(4013),
    "deadline-sum": replace(running(4022), expires_at=LATER),
    "metadata-missing": running(4016),
    "metadata-not-utf8": ENDED,
}
SANDBOXES: dict[str, SandboxStatus] = {
    "web": SandboxStatus(boot_id=BOOT_ID),
    "batch": SandboxStatus(),
    "stopped": SandboxStatus(stopped_at=BEGIN + SECOND, reason="Stopped", message=STRANGE, boot_id=BOOT_ID),
    "with-all": SandboxStatus(
        namespaces={"network": "/run/netns/x", "ipc": f"/run/{STRANGE}"},
        addresses=("10.0.0.7", "fd00::7"),
        extra={"owner": STRANGE},
        expires_at=BEGIN + 3600 * SECOND,
    ),
    # From here on they are damaged later.
    "sandbox-sum": SandboxStatus(),
    "sandbox-missing": SandboxStatus(),
    "sandbox-not-utf8": SandboxStatus(),
    "sandbox-status-sum": SandboxStatus(stopped_at=BEGIN),
    "sandbox-status-missing": SandboxStatus(),
}
IN_OTHER_SANDBOXES = {"in-sandbox-sum": "sandbox-sum", "in-sandbox-missing": "sandbox-missing"}
DAMAGE: tuple[str, ...] = (
    "UPDATE container_status SET exit_code = 0 WHERE id = 'status-sum'",
    "UPDATE container_status SET pid = 9999 WHERE id = 'status-sum-running'",
    "DELETE FROM container_status WHERE id = 'status-missing'",
    "UPDATE container_status SET message = CAST(x'ff61' AS TEXT) WHERE id = 'status-not-utf8'",
    "UPDATE container SET log_path = '/var/log/limpet/other' WHERE id = 'metadata-sum'",
    "DELETE FROM container WHERE id = 'metadata-missing'",
    "UPDATE container SET log_path = CAST(x'ff61' AS TEXT) WHERE id = 'metadata-not-utf8'",
    "UPDATE sandbox SET name = 'other' WHERE id = 'sandbox-sum'",
    "DELETE FROM sandbox WHERE id = 'sandbox-missing'",
    "UPDATE sandbox_status SET stopped_at = 0 WHERE id = 'sandbox-status-sum'",
    "DELETE FROM sandbox_status WHERE id = 'sandbox-status-missing'",
    "UPDATE deadline SET boot_at = 0 WHERE id = 'deadline-sum'",
    "UPDATE item SET value = '[1]' WHERE key = 'soon damaged'",
    "UPDATE sandbox SET root_dir = CAST(x'ff61' AS TEXT) WHERE id = 'sandbox-not-utf8'",
    "UPDATE container_status SET started_at = 0 WHERE id = 'n2-status-sum'",
)


class Gone:
    """A probe of nobody's processes: each has ended unseen."""

    def observe(self, _: object) -> Observation:
        return Observation(boot=Boot.SAME, process=Process.GONE)


def sandbox(id: str) -> SandboxMetadata:
    config = {
        "metadata": {"name": id, "uid": f"uid-{id}", "namespace": "default", "attempt": 1},
        "labels": {"tier": STRANGE},
        "annotations": {"note": "\u732b"},
        "port_mappings": [{"container_port": 80, "host_port": 8080}],
    }
    return SandboxMetadata(
        id=id,
        name=id,
        config=parse_pod_sandbox_config(config),
        created_at=BEGIN,
        root_dir=f"/var/lib/limpet/sandboxes/{id}",
    )


def container(id: str, sandbox_id: str = "web", *, name: str = "", attempt: int = 0, bundle: bool = True) -> Metadata:
    config = {
        "metadata": {"name": name or id, "attempt": attempt},
        "image": {"image": "host"},
        "command": ["/bin/sh"],
        "args": ["-c", 'echo "$GREETING"', STRANGE],
        "envs": [{"key": "GREETING", "value": "gr\u00fc\u00df\x01"}],
        "labels": {"app": id, "strange \u00e4\n": STRANGE},
        "annotations": {"note": "\u732b\t\x7f"},
    }
    return Metadata(
        id=id,
        name=name or id,
        sandbox_id=sandbox_id,
        config=parse_container_config(config),
        image_manifest=IMAGE,
        restart_policy="on-failure:3" if name else "no",
        restart_count=attempt,
        restart_delay=attempt * SECOND,
        log_path=f"/var/log/limpet/{id}.log" if bundle else "",
        stop_signal="SIGINT" if bundle else "SIGTERM",
        root_dir=f"/var/lib/limpet/containers/{id}" if bundle else "",
        starter="process" if bundle else "",
    )


def fill_local(store: Store) -> None:
    """Add a container in each state, some that come to it step by step, and the report of a recovery pass."""
    for key, sandbox_status in SANDBOXES.items():
        store.add_sandbox(sandbox(key), sandbox_status)
    for key in ("volume-1", "soon damaged"):
        store.put("volume", key, {"path": STRANGE, "size": 1 << 40})
        store.put("volume", key, {"path": STRANGE, "size": 2 << 40})
    store.add(container("recovered", "batch"), running(4020))
    recover(store, probe=Gone())
    for key, status in STATUSES.items():
        store.add(container(key, bundle=key != "running-anonymous"), status)
    for key, sandbox_id in IN_OTHER_SANDBOXES.items():
        store.add(container(key, sandbox_id), ENDED)
    for attempt in range(3):
        store.add(container(f"again-{attempt}", "batch", name="again", attempt=attempt), failed(3, "Error"))
    store.add(container("step-by-step", "batch"))
    for status in (CREATED, running(4021), replace(running(4021), message="halfway"), failed(7, "Error", "", 4021)):
        store.checkpoint("step-by-step", status)
    store.add(container("busy", "batch"), CREATED)
    for turn in range(80):  # 81 state changes in all, of which a history keeps 64
        store.checkpoint("busy", failed(turn, "Error", f"turn {turn}") if turn % 2 else running(4100 + turn))
    store.add(container("deleted", "batch"), ENDED)
    store.delete("deleted")


def fill_second(store: Store) -> None:
    """Add containers whose ids the other node uses, too."""
    store.add_sandbox(sandbox("web"))
    store.add(container("n2-recovered"), running(4030))
    recover(store, probe=Gone())
    for key, status in {
        "new": Status(),
        "running": running(4031),
        "exited-0": replace(ENDED, message="on n2"),
        "n2-status-sum": running(4032),
    }.items():
        store.add(container(key), status)


def fill_before_kill(store: Store) -> None:
    """Add what will be in the database file."""
    store.add_sandbox(sandbox("web"))
    store.add(container("before"), CREATED)
    store.add(container("before-exited"), ENDED)


def fill_and_be_killed(state_dir: str) -> None:
    """Add what will be in the WAL alone; does not return."""
    store = Store.open(state_dir)
    store.checkpoint("before", running(5001))
    store.add_sandbox(sandbox("late"))
    store.add(container("late-new", "late"))
    store.add(container("late-running", "late"), replace(running(5002), resources=LIMITS, message=f"nul \0 {STRANGE}"))
    store.add(container("late-exited", "late"), running(5003))
    store.checkpoint("late-exited", failed(137, "Error", "ended by signal 9", 5003))
    os.kill(os.getpid(), signal.SIGKILL)


def damage(state_dir: str) -> None:
    """Damage the closed database behind the store's back, each kind on rows of its own."""
    with closing(sqlite3.connect(f"{state_dir}/store.db", isolation_level=None)) as raw:
        raw.execute("VACUUM")
        raw.execute("PRAGMA foreign_keys = off")
        for statement in DAMAGE:
            assert raw.execute(statement).rowcount == 1, statement
        # Resources that do not decode, in a row whose checksum is right.
        raw.execute("UPDATE container_status SET resources = '{\"requested\":1}' WHERE id = 'resources-unreadable'")
        columns = ", ".join(sealed_columns("container_status", SCHEMA_REVISION))
        row = raw.execute(f"SELECT {columns} FROM container_status WHERE id = 'resources-unreadable'").fetchone()
        checksum = seal(row)
        raw.execute("UPDATE container_status SET checksum = ? WHERE id = 'resources-unreadable'", (checksum,))


def pack(state_dir: str, target: str) -> None:
    """Write the directory as state/ into a tar.gz, in order and without times and owners."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(state_dir, "state", filter=_strip)  # adds names in order
    with open(target, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(content.getvalue())


def _strip(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mode &= 0o7777
    assert member.mode == (0o700 if member.isdir() else 0o600), (member.name, oct(member.mode))
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def run_in_child(work: Callable[[str], None], state_dir: str) -> int:
    """Run `work` in a fork and return the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work(state_dir)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def save(state_dir: str, name: str, expected: Said) -> None:
    """Pack the directory, and write beside it what is expected of it."""
    pack(state_dir, f"{name}.tar.gz")
    with open(f"{name}.json", "w", encoding="utf-8") as file:
        json.dump(expected, file, indent=1, sort_keys=True)
        file.write("\n")


def stop_the_clock() -> None:
    """Let every time that is written down be a made-up one, and the boot, too."""
    clock = itertools.count(BEGIN + 3600 * SECOND, SECOND)
    time.time_ns = lambda: next(clock)
    time.monotonic_ns = lambda: 0
    deadlines.read_machine_clock = lambda: 100 * SECOND  # type: ignore[attr-defined]
    for module in (recovery_pass, draft, deadlines):
        module.read_boot_id = lambda: BOOT_ID  # type: ignore[attr-defined]


def read_copy(state_dir: str, nodes: tuple[str, ...]) -> Said:
    """Return what a copy of the state directory says when it is opened, as if it were moved: opening it changes it."""
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copytree(state_dir, f"{directory}/state")
        os.unlink(f"{copy}/directory.json")
        return read(copy, list(nodes))


def main() -> None:
    """Write the four files."""
    target = str(STATES)
    os.umask(0o077)
    stop_the_clock()
    with tempfile.TemporaryDirectory() as directory:
        state_dir = f"{directory}/state"
        for node, fill in zip(NODES, (fill_local, fill_second), strict=True):
            with Store.open(state_dir, node=node) as store:
                fill(store)
        damage(state_dir)
        save(state_dir, f"{target}/{SCHEMA_REVISION}", read_copy(state_dir, NODES))
        killed_dir = f"{directory}/killed"
        with Store.open(killed_dir) as store:
            fill_before_kill(store)
        assert run_in_child(fill_and_be_killed, killed_dir) == signal.SIGKILL
        assert os.path.getsize(f"{killed_dir}/store.db-wal") > 0
        save(killed_dir, f"{target}/{SCHEMA_REVISION}-killed", read_copy(killed_dir, NODES[:1]))


if __name__ == "__main__":
    main()
