"""Containers that write without end, while all goes wrong with their logs: `python -m tests.logs.flood`, as root.

Each writes numbers as fast as it can. The log copier is killed each second, logs are rotated all the time, and their
disk is full for a while, and frozen for a while. In the meantime other containers are started. Found wrong is: a line
that is lost, doubled or torn, a container that has ended, a log that was not rotated, and a start that took longer than
`--slowest` allows. The logs' disk is an ext4 file system on a loop device, in a mount namespace of its own. Status 1 if
anything is found, 3 where it cannot be tried.
"""

import argparse
import glob
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

import pytest

from limpet.engine import Container, Engine
from limpet.engine.logs import read_log
from limpet.schema import ContainerState

_NOT_TRIED: Final = 3
_ROTATE_AT: Final = 256 << 10
_KEPT: Final = 5
_DISK_BYTES_EACH: Final = 4 << 20
_DISK_BYTES: Final = 16 << 20
_BETWEEN_STARTS_SECONDS: Final = 0.1
_BETWEEN_KILLS_SECONDS: Final = 1.0


class Told(NamedTuple):
    """What a flood has shown."""

    findings: list[str]
    starts: list[float]
    """How long each took, in milliseconds, in order of size."""
    lines: int
    kills: int

    def render(self) -> str:
        """Return it in a few lines."""
        middle, slowest = self.starts[len(self.starts) // 2], self.starts[-1]
        starts = f"{len(self.starts)} starts: p50 {middle:.1f} ms, slowest {slowest:.1f} ms"
        kept = f"{self.lines:,} lines in the logs that are left"
        counts = f"{kept}; {self.kills} kills of the copier; {starts}; {len(self.findings)} findings"
        return "\n".join([*self.findings, counts])


def find_obstacle() -> str:
    """Return why this cannot be tried here, "" if it can."""
    if os.geteuid():
        return "only root mounts"
    return "" if os.path.exists("/dev/loop-control") else "there are no loop devices here"


def flood(seconds: float, count: int, slowest_ms: float) -> Told:
    """Let so many containers write for so long. In a mount namespace of its own."""
    patch = pytest.MonkeyPatch()  # which fails for what is somewhere else by now
    patch.setattr("limpet.engine.starters.process.starts._LOG_BYTES", _ROTATE_AT)
    patch.setattr("limpet.engine.starters.process.starts._LOG_FILES", _KEPT)
    with tempfile.TemporaryDirectory(prefix="limpet-flood-") as place, _disk(place, count * _DISK_BYTES_EACH) as disk:
        with Engine.open(f"{place}/state") as engine:
            engine.create_sandbox({"metadata": {"name": "jobs"}, "log_directory": f"{disk}/logs"}, id="jobs")
            writers = [_make(engine, f"w{number}", "exec seq 1 1000000000", "log") for number in range(count)]
            for each in writers:
                each.start()
            with _copier_killed(f"{place}/state") as kills, _trouble(disk, seconds):
                starts = _measure_starts(engine, time.monotonic() + seconds)
            findings = [f"{each.id} has ended: {each.status}" for each in writers if each.state is not _RUNNING]
            findings += [f"a start took {each:.1f} ms" for each in starts if each > slowest_ms > 0]
            lines = 0
            for each in writers:
                each.stop(0)
                each.release()
                found, more = _judge(f"{disk}/logs", each.metadata.log_path)
                findings += [f"{each.id}: {one}" for one in more]
                lines += found
                if not glob.glob(f"{each.metadata.log_path}.*"):
                    findings.append(f"{each.id}: its log was not rotated")
        if not kills:
            findings.append("no copier was killed")
        return Told(findings, sorted(starts), lines, len(kills))


_RUNNING = ContainerState.RUNNING


def _make(engine: Engine, key: str, script: str, log: str = "") -> Container:
    config = {"metadata": {"name": key}, "image": {"image": "host"}, "command": ["sh", "-c", script]}
    return engine.create_container(config | ({"log_path": f"{key}.{log}"} if log else {}), "jobs", id=key)


def _measure_starts(engine: Engine, until: float) -> list[float]:
    """Start one container after another; return how many milliseconds each start took."""
    took: list[float] = []
    while time.monotonic() < until:
        container = _make(engine, f"s{len(took)}", "exit 0")
        began = time.monotonic()
        container.start()
        took.append(1000 * (time.monotonic() - began))
        container.wait(20)
        container.remove(force=True)
        time.sleep(_BETWEEN_STARTS_SECONDS)
    return took


@contextmanager
def _trouble(disk: str, seconds: float) -> Iterator[None]:
    """Fill the disk after a sixth of the time, for a sixth; freeze it after a half, for a sixth."""
    over = threading.Event()

    def make() -> None:
        if over.wait(seconds / 6):
            return
        with open(f"{disk}/ballast", "wb", buffering=0) as file:
            while not over.is_set():
                try:
                    file.write(b"x" * (1 << 16))
                except OSError:
                    break
        over.wait(seconds / 6)
        os.unlink(f"{disk}/ballast")
        if over.wait(seconds / 6):
            return
        subprocess.run(["fsfreeze", "-f", disk], check=True)
        over.wait(seconds / 6)
        subprocess.run(["fsfreeze", "-u", disk], check=True)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _copier_killed(state_dir: str) -> Iterator[list[int]]:
    """Kill the log copier again and again while the block runs; yield a list of the pids that were killed."""
    over = threading.Event()
    killed: list[int] = []

    def run() -> None:
        while not over.wait(_BETWEEN_KILLS_SECONDS):
            killed.extend(_kill_copier(state_dir))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def _kill_copier(state_dir: str) -> Iterator[int]:
    directory = os.path.join(os.path.realpath(state_dir), "keeper")
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/comm", encoding="utf-8", errors="replace") as file:
            if file.read() == "limpet-copier\n" and os.readlink(f"/proc/{name}/fd/3") == directory:
                os.kill(int(name), signal.SIGKILL)
                yield int(name)


def _judge(directory: str, path: str) -> tuple[int, list[str]]:
    """Return how many lines a log has, and which follow each other wrongly. Older ones were rotated away.

    The writer was killed, so that its last line may be the beginning of one.
    """
    last, count, wrong = 0, 0, []
    entries = [entry.text.decode(errors="replace") for entry in read_log(directory, path)]
    before = entries[-2].rstrip() if len(entries) > 1 else ""
    if before.isdigit() and not entries[-1].endswith("\n") and str(int(before) + 1).startswith(entries[-1]):
        entries.pop()
    for text in map(str.rstrip, entries):
        if not text.isdigit() or (last and int(text) != last + 1):
            wrong.append(f"{text!r} comes after {last}")
        last = int(text) if text.isdigit() else last
        count += 1
    return count, wrong[:3] if count else ["its log is empty"]


@contextmanager
def _disk(place: str, size: int) -> Iterator[str]:
    """Mount a file system of so many bytes."""
    image, root = f"{place}/image", f"{place}/disk"
    os.mkdir(root)
    with open(image, "wb") as file:
        file.truncate(size + _DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, root], check=True)
    os.mkdir(f"{root}/logs", 0o700)
    try:
        yield root
    finally:
        subprocess.run(["fsfreeze", "-u", root], check=False, capture_output=True)  # where the time was too short
        subprocess.run(["umount", "-l", root], check=True)


def main() -> int:
    """Try it, and tell what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--containers", type=int, default=50)
    parser.add_argument(
        "--slowest", type=float, default=20, help="how many ms a start may take; 0 for any (default: 20)"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    obstacle = find_obstacle()
    if obstacle:
        print(f"not tried: {obstacle}", file=sys.stderr)
        return _NOT_TRIED
    if not options.inside:
        command = ["unshare", "--mount", sys.executable, "-m", "tests.logs.flood", "--inside", *sys.argv[1:]]
        return subprocess.run(command, check=False).returncode
    told = flood(options.seconds, options.containers, options.slowest)
    print(told.render())
    return 1 if told.findings else 0


if __name__ == "__main__":
    sys.exit(main())
