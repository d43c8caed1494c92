"""A runtime that manages its own processes and keeps their state in a Store. It is killed, and recovers.

Each job runs under a shell that first waits for a line on its standard input: the gate. So a job that is not on
disk yet cannot run, and a runtime that dies before it is takes the job with it. When the job has ended, the shell
leaves its exit code in a file, where a later runtime finds it.

python own_runtime.py STATE_DIR RECORDS_DIR
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from limpet.engine import Store, recover
from limpet.recovery import HostProbe, Observation, Process, Subject
from limpet.recovery.host import compare, identify, open_pidfd, read_exit_code
from limpet.schema import ImageManifest, ImageName, Metadata, ProcessIdentity, SandboxMetadata, Status
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.status import end

STATE_DIR, RECORDS = sys.argv[1], Path(sys.argv[2])
WRAPPER = """
read -r go || exit 128
"$@" < /dev/null
echo $? > "$RECORD.tmp" && mv "$RECORD.tmp" "$RECORD"
"""


def describe(name: str, *command: str) -> Metadata:
    """Return what never changes of a job."""
    config = {"metadata": {"name": name}, "image": {"image": "none"}, "command": list(command)}
    return Metadata(
        id=name,
        name=name,
        sandbox_id="jobs",
        config=parse_container_config(config),
        image_manifest=ImageManifest(name=ImageName("none")),
    )


def prepare(job: Metadata) -> tuple[subprocess.Popen[bytes], ProcessIdentity]:
    """Make a job's process, held at its gate, and say which process exactly it is."""
    process = subprocess.Popen(
        ["sh", "-c", WRAPPER, "sh", *job.config.command],
        stdin=subprocess.PIPE,
        env={**os.environ, "RECORD": str(RECORDS / job.id)},
        start_new_session=True,
    )
    with open_pidfd(process.pid) as pidfd:
        return process, identify(process.pid, pidfd)


def running(identity: ProcessIdentity) -> Callable[[Status], Status]:
    """Return the change that says: this process is the job."""
    return lambda old: replace(old, started_at=time.time_ns(), pid=identity.pid, identity=identity)


def open_gate(process: subprocess.Popen[bytes]) -> None:
    """Let a job run."""
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.close()


def live_and_die() -> None:
    """Add three jobs, start two of them, and be killed while the third is held at its gate."""
    store = Store.open(STATE_DIR)
    config = parse_pod_sandbox_config({"metadata": {"name": "jobs"}})
    store.add_sandbox(SandboxMetadata(id="jobs", name="jobs", config=config, created_at=time.time_ns()))
    quick, slow = describe("quick", "sh", "-c", "sleep 0.2; exit 7"), describe("slow", "sleep", "1000")
    held = describe("held", "touch", str(RECORDS / "held-has-run"))
    with store.transaction() as change:  # all three, or none
        for job in (quick, slow, held):
            change.add(job, Status(created_at=time.time_ns()))

    prepared = {job.id: prepare(job) for job in (quick, slow, held)}
    with store.transaction() as change:
        for job in (quick, slow):
            change.update(job.id, running(prepared[job.id][1]))
    for job in (quick, slow):  # only now: what runs is on disk
        open_gate(prepared[job.id][0])

    os.kill(os.getpid(), signal.SIGKILL)


class RecordProbe:
    """Looks for a job's exit record first, then at the host's processes."""

    def __init__(self) -> None:
        self._host = HostProbe()

    def observe(self, container: Subject) -> Observation:
        """Return what became of the job."""
        seen = self._host.observe(container)
        record = RECORDS / container.id
        if not record.exists():
            return seen
        return replace(
            seen,
            process=Process.ENDED,
            exit_code=int(record.read_text()),
            finished_at=record.stat().st_mtime_ns,
        )


def stop(store: Store, job_id: str) -> Status:
    """End a job that an earlier runtime has started, and write down how it ended."""
    identity = store.status(job_id).identity
    assert identity is not None
    with open_pidfd(identity.pid) as pidfd:
        found, detail = compare(identity, pidfd)
        if found is not Process.ALIVE:
            raise RuntimeError(f"{job_id} is not signalled: {detail}")
        os.killpg(identity.pid, signal.SIGTERM)  # its leader, shown to be ours, keeps the group's number taken
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(10_000)
        exit_code = read_exit_code(identity.pid, pidfd)
    return store.checkpoint(job_id, end(store.status(job_id), exit_code, finished_at=time.time_ns()))


def main() -> None:
    """Let a runtime die, and be the one that comes after it."""
    if os.fork() == 0:
        live_and_die()
    os.wait()
    deadline = time.monotonic() + 10
    while not (RECORDS / "quick").exists() and time.monotonic() < deadline:  # it ends while no runtime is there
        time.sleep(0.01)

    with Store.open(STATE_DIR) as store:
        print("before:", {record.id: record.status.state.name for record in store.list()})
        for finding in recover(store, probe=RecordProbe()).findings:
            print(f"{finding.id}: {finding.state} [{finding.rule}] {finding.because}")
        print("quick:", store.status("quick").exit_code)
        print("slow:", stop(store, "slow").exit_code)
        print("held has run:", (RECORDS / "held-has-run").exists())


if __name__ == "__main__":
    main()
