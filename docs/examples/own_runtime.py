"""A runtime of your own on the Store: it is killed amid a stop, and the next one finishes what was decided.

A shell waits at a gate until its job is on disk, and leaves the job's exit code in a file: python own_runtime.py DIR
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from limpet import Store, recover
from limpet.recovery import HostProbe, Observation, Process, Subject
from limpet.recovery.host import compare, identify, open_pidfd
from limpet.schema import ImageManifest, ImageName, Metadata, SandboxMetadata, Status
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.status import end

DIRECTORY = Path(sys.argv[1])
STARTED: list["subprocess.Popen[bytes]"] = []
JOB = 'trap : TERM; read -r go || exit; sh -c "$1" < /dev/null; echo $? > "$0.tmp"; mv "$0.tmp" "$0"'


class RecordProbe(HostProbe):
    """Looks at processes, and at the exit records that they leave."""

    def observe(self, container: Subject) -> Observation:
        """Return what became of a job."""
        seen, record = super().observe(container), DIRECTORY / container.id
        if not record.exists():
            return seen
        code, at = int(record.read_text()), record.stat().st_mtime_ns
        return replace(seen, process=Process.ENDED, exit_code=code, finished_at=at)


def start(store: Store, name: str, command: str, **extra: object) -> None:
    """Run a command as a job, which is on disk before it runs; `extra` is kept with it."""
    job = parse_container_config({"metadata": {"name": name}, "image": {"image": "none"}, "command": [command]})
    manifest = ImageManifest(name=ImageName("none"))
    metadata = Metadata(id=name, name=name, sandbox_id="jobs", config=job, image_manifest=manifest)
    shell = ["sh", "-c", JOB, str(DIRECTORY / name), command]
    process = subprocess.Popen(shell, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    STARTED.append(process)
    with open_pidfd(process.pid) as pidfd:
        identity, now = identify(process.pid, pidfd), time.time_ns()
    store.add(metadata, Status(created_at=now, started_at=now, pid=process.pid, identity=identity, extra=extra))
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.close()


def stop(store: Store, name: str) -> None:
    """Carry out the stop that was written down: no process is signalled that is not shown to be the job's."""
    identity = store.status(name).identity
    assert identity is not None
    with open_pidfd(identity.pid) as pidfd:
        if compare(identity, pidfd)[0] is Process.ALIVE:
            os.killpg(identity.pid, signal.SIGTERM)
    wait_for((DIRECTORY / name).exists)
    store.update(name, lambda old: end(old, int((DIRECTORY / name).read_text()), finished_at=time.time_ns()))


def live_and_die() -> None:
    """Start two jobs, decide that one is to stop, and be killed before it is told."""
    store = Store.open(DIRECTORY / "state")
    pod = parse_pod_sandbox_config({"metadata": {"name": "jobs"}})
    store.add_sandbox(SandboxMetadata(id="jobs", name="jobs", config=pod, created_at=time.time_ns()))
    start(store, "quick", "sleep 0.2; exit 7", owner="ci")
    start(store, "slow", "sleep 1000", owner="me")
    why = {"owner": "me", "why": "too slow"}  # the intent and what is ours change together
    store.update("slow", lambda old: replace(old, stop_requested_at=time.time_ns(), extra=why))
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it is true, for ten seconds at most."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def main() -> None:
    """Let a runtime die, and be the one that comes after it."""
    if os.fork() == 0:
        live_and_die()
    os.wait()
    wait_for((DIRECTORY / "quick").exists)  # it ends while no runtime is there
    with Store.open(DIRECTORY / "state") as store:
        for finding in recover(store, probe=RecordProbe()).findings:
            print(f"{finding.id}: {finding.state} [{finding.rule}]")
        for job in store.list(state="running"):
            if job.status.stop_requested_at:
                stop(store, job.id)
        print("mine:", {job.id: job.status.exit_code for job in store.list(extra={"owner": "me"})})
        newest = store.revision
        for event in store.watch(since=0):  # a watcher goes on for ever
            print(event.revision, event.kind.value, event.id, event.exit_code)
            if event.revision == newest:
                break


if __name__ == "__main__":
    main()
