"""Real power cuts: `python -m tests.campaigns.real_disks --cuts 300 --seed 1`, as root.

A life runs on an ext4 and on an XFS file system of its own, on a loop device. Before one of its system calls that
change files, drawn by the seed, the file system is shut down without its journal being flushed (FS_IOC_SHUTDOWN of the
kernel), which leaves what a power cut would; it is mounted again, and what is there is compared with what was
acknowledged. A third of the recoveries are cut in the same way. All happens in a mount namespace of its own, so that
nothing stays mounted however this ends. Status 1 if anything is lost, or if nothing is in the control, a store that
does not flush its commits; 3 where it cannot be tried.
"""

import argparse
import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from limpet.engine.drill.controls import UnflushedLife
from limpet.engine.drill.engine_life import EngineLife
from limpet.engine.drill.store_life import StoreLife
from limpet.engine.state.durable import sync_directory
from limpet.testing import Violation, Workload, supported
from limpet.testing.supervisor import Supervisor
from tests.campaigns.sizes import CAMPAIGNS

_SHUTDOWN: Final = 0x8004587D  # _IOR('X', 125, __u32), in ext4 and XFS alike
_NO_LOG_FLUSH: Final = 2
FILE_SYSTEMS: Final = {"ext4": 64 << 20, "xfs": 400 << 20}
"""Each with the size of its device in bytes, near the least that its mkfs takes."""
_LIVES: Final[Sequence[Callable[[int], Workload]]] = (
    lambda seed: StoreLife(12, seed=seed),
    lambda seed: StoreLife(4, seed=seed),
    lambda seed: EngineLife(seed, processes=False),
)
_CALLS: Final = 600
"""A life has about so many calls that change files; some have fewer, and are cut at their end."""
_RECOVERY_CALLS: Final = 60
_CONTROLS: Final = 8
_NOT_TRIED: Final = 3


class Tally(NamedTuple):
    """What the cuts of one file system have shown."""

    cuts: int = 0
    acknowledged: int = 0
    findings: tuple[str, ...] = ()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class _Disk:
    """One file system in one file, and where it is mounted."""

    def __init__(self, kind: str, directory: str) -> None:
        self._kind, self._image, self.root = kind, f"{directory}/{kind}.img", f"{directory}/{kind}"
        os.mkdir(self.root)
        with open(self._image, "wb") as file:
            file.truncate(FILE_SYSTEMS[kind])
        _run(f"mkfs.{kind}", "-q", self._image)

    def mount(self) -> None:
        _run("mount", "-t", self._kind, "-o", "loop", self._image, self.root)

    def unmount(self) -> None:
        _run("umount", self.root)

    def cut_power(self) -> None:
        """Lose what has not been flushed, and come back."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(descriptor)
        self.unmount()
        self.mount()

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        self.mount()
        try:
            yield
        finally:
            self.unmount()


def _run_until(function: Callable[[], None], calls: int, then: Callable[[], None]) -> None:
    """Run a function in a process of its own until before this many calls that change files; or to its end."""
    with Supervisor(function) as supervisor:
        for number, event in enumerate(supervisor.events()):
            if number == calls:
                supervisor.kill()
                break
            supervisor.let_go(event)
    then()


def _cut(disk: _Disk, life: Workload, rng: random.Random) -> list[bytes]:
    """Run a life until the power is cut, and return what it had acknowledged."""
    directory = f"{disk.root}/life"
    os.mkdir(directory)
    sync_directory(disk.root)  # the empty directory is there before the life begins
    reading, writing = os.pipe2(os.O_CLOEXEC)

    def acknowledge(data: bytes) -> None:
        os.write(writing, data + b"\n")

    with open(reading, "rb") as acknowledgements:
        try:
            _run_until(lambda: life.live(directory, acknowledge), rng.randrange(_CALLS), disk.cut_power)
        finally:
            os.close(writing)
        acknowledged = acknowledgements.read().splitlines()
    if rng.randrange(3) == 0:
        _run_until(lambda: life.check(directory, acknowledged), rng.randrange(_RECOVERY_CALLS), disk.cut_power)
    return acknowledged


def _try(kind: str, lives: Mapping[int, Workload], seed: int, directory: str, name: str) -> Tally:
    tally = Tally()
    disk = _Disk(kind, directory)
    began = time.monotonic()
    for number, life in lives.items():
        with disk.mounted():
            acknowledged = _cut(disk, life, random.Random(f"{seed}:{kind}:{number}"))
            findings = tally.findings
            try:
                life.check(f"{disk.root}/life", acknowledged)
            except Violation as violation:
                findings += (f"{name}, cut {number}: {violation.kind}: {violation}",)
            except Exception as error:  # noqa: BLE001  # a store that cannot be recovered is what we look for
                findings += (f"{name}, cut {number}: {type(error).__name__}: {error}",)
            tally = Tally(tally.cuts + 1, tally.acknowledged + len(acknowledged), findings)
            shutil.rmtree(f"{disk.root}/life")
        if sys.stderr.isatty():
            rate = (number + 1) / (time.monotonic() - began) * 60
            sys.stderr.write(
                f"\r{name}: {number + 1} of {len(lives)} cuts, {rate:.0f} a minute, {len(findings)} found "
            )
    if sys.stderr.isatty():
        sys.stderr.write("\r" + " " * 78 + "\r")
    return tally


def find_obstacle(kinds: Sequence[str]) -> str | None:
    """Return why real disks cannot be tried here, None if they can."""
    if os.geteuid() != 0:
        return "only root may mount a file system"
    missing = [tool for tool in ("unshare", "mount", *(f"mkfs.{kind}" for kind in kinds)) if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} missing: install util-linux, e2fsprogs, xfsprogs"
    if not os.path.exists("/dev/loop-control"):
        return "there are no loop devices here"
    return supported()


def _enter_namespace() -> None:
    """Go on in a mount namespace of one's own; what is mounted there ends with it."""
    os.execvp(
        "unshare", ["unshare", "--mount", sys.executable, "-m", "tests.campaigns.real_disks", "--inside", *sys.argv[1:]]
    )


def main() -> int:
    """Cut the power of every file system, and print what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.real_disks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=CAMPAIGNS["disks"].long_run, help="how many, over all file systems")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="only the cut with this number, of each file system")
    parser.add_argument("--fs", choices=FILE_SYSTEMS, action="append", help="only this one; repeatable")
    parser.add_argument("--dir", help="where the devices' files are made")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = options.fs or list(FILE_SYSTEMS)
    obstacle = find_obstacle(kinds)
    if obstacle is not None:
        print(f"not tried: {obstacle}", file=sys.stderr)
        return _NOT_TRIED
    if not options.inside:
        _enter_namespace()
    numbers = range(-(-options.cuts // len(kinds))) if options.only is None else [options.only]
    lives = {number: _LIVES[number % len(_LIVES)](options.seed + number) for number in numbers}
    controls = {number: UnflushedLife(12, seed=options.seed + number) for number in range(_CONTROLS)}
    clean = True
    print(f"{'FILE SYSTEM':13}{'CUTS':>6}{'ACKNOWLEDGED':>14}{'FOUND':>7}{'CONTROL FOUND':>15}{'SECONDS':>9}")
    for kind in kinds:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="limpet-disk-") as directory:
            tally = _try(kind, lives, options.seed, directory, kind)
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="limpet-disk-") as directory:
            control = _try(kind, controls, options.seed, directory, f"{kind}, the control")
        found = f"{len(control.findings)} of {control.cuts}"
        row = f"{kind:13}{tally.cuts:>6,}{tally.acknowledged:>14,}{len(tally.findings):>7,}{found:>15}"
        print(f"{row}{time.monotonic() - began:>9.1f}", *tally.findings, sep="\n", flush=True)
        clean = clean and not tally.findings and bool(control.findings)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
