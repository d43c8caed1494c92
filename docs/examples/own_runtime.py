"""A runtime of your own on the Store: it is killed amid a stop, and the next one finishes what was decided.

A job's shell waits until the job is on disk, and leaves the exit code in a file: python own_runtime.py DIR
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from msgspec.structs import replace

from limpet import Store, recover
from limpet.recovery import HostProbe, Observation, Process, Subject
from limpet.recovery.host import compare, identify, open_pidfd
from limpet.schema import ImageManifest, ImageName, Metadata, SandboxMetadata, Status
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.status import end

EXITS = Path(sys.argv[1])
JOB = 'trap : TERM; read -r go || exit; sh -c "$1" < /dev/null; echo $? > "$0.tmp"; mv "$0.tmp" "$0"'


class ExitProbe(HostProbe):
    """Looks at processes, and at the exit codes that they have left."""

    def observe(self, container: Subject) -> Observation:
        """Return what became of a job."""
        seen, file = super().observe(container), EXITS / container.id
        if not file.exists():
            return seen
        code, at = int(file.read_text()), file.stat().st_mtime_ns
        return replace(seen, process=Process.ENDED, exit_code=code, finished_at=at)


def start(store: Store, name: str, command: str, **extra: object) -> "subprocess.Popen[bytes]":
    """Run a command as a job, which is on disk before it runs; `extra` is kept with it."""
    gate, key = os.pipe()
    shell = ["sh", "-c", JOB, str(EXITS / name), command]
    process = subprocess.Popen(shell, stdin=gate, stderr=subprocess.DEVNULL, start_new_session=True)
    with open_pidfd(process.pid) as pidfd:
        identity, now = identify(process.pid, pidfd), time.time_ns()
    config = parse_container_config({"metadata": {"name": name}, "image": {"image": "none"}, "command": [command]})
    image = ImageManifest(name=ImageName("none"))
    job = Metadata(id=name, name=name, sandbox_id="jobs", config=config, image_manifest=image)
    store.add(job, Status(created_at=now, started_at=now, pid=process.pid, identity=identity, extra=extra))
    os.write(key, b"go\n")
    return process


def stop(store: Store, name: str) -> None:
    """Carry out a stop that was written down: no process is signalled that is not shown to be the job's."""
    if identity := store.status(name).identity:
        with open_pidfd(identity.pid) as pidfd:
            if compare(identity, pidfd)[0] is Process.ALIVE:
                os.killpg(identity.pid, signal.SIGTERM)
    code = int(wait_for(EXITS / name).read_text())
    store.update(name, lambda old: end(old, code, finished_at=time.time_ns()))


def wait_for(file: Path) -> Path:
    """Return the file once it is there."""
    while not file.exists():
        time.sleep(0.01)
    return file


def live_and_die() -> None:
    """Start two jobs, decide that one is to stop, and be killed before it is told."""
    store = Store.open(EXITS / "state")
    pod = parse_pod_sandbox_config({"metadata": {"name": "jobs"}})
    store.add_sandbox(SandboxMetadata(id="jobs", name="jobs", config=pod, created_at=time.time_ns()))
    _jobs = [start(store, "quick", "sleep 0.2; exit 7", owner="ci"), start(store, "slow", "sleep 1000", owner="me")]
    why = {"owner": "me", "why": "too slow"}  # the intent and what is ours change together
    store.update("slow", lambda old: replace(old, stop_requested_at=time.time_ns(), extra=why))
    os.kill(os.getpid(), signal.SIGKILL)


def come_after() -> None:
    """See what became of each job, finish the stop, and tell what has happened."""
    with Store.open(EXITS / "state") as store:
        for finding in recover(store, probe=ExitProbe()).findings:
            print(f"{finding.id}: {finding.state} [{finding.rule}]")
        for job in store.list(state="running"):
            if job.status.stop_requested_at:
                stop(store, job.id)
        print("mine:", {job.id: job.status.exit_code for job in store.list(extra={"owner": "me"})})
        for event in store.watch(since=0):  # a watcher goes on for ever
            print(event.revision, event.kind.value, event.id, event.exit_code)
            if event.revision == store.revision:
                break


if __name__ == "__main__":
    if os.fork() == 0:
        live_and_die()
    os.wait()
    wait_for(EXITS / "quick")  # it ends while no runtime is there
    come_after()
