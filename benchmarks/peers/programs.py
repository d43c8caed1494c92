"""The programs that managers start, what becomes of them, and what else happens on their machine.

All of it is in a pid and a mount namespace of its own, where pids can be chosen, and a machine can be rebooted.
"""

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 120.0
_CODES = (0, 3, 7, 42, 113)
_FATES = ("early", "down", "lasting", "down", "killed", "early", "down", "lasting", "down", "lasting")
"""Of ten two end early, four while the manager is down, one is killed then, three run on."""
_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_INSIDE = "LIMPET_PEERS_INSIDE"
_PID_TRIES = 200
_REAPED_SECONDS = 10.0


class Program(NamedTuple):
    """A container, what becomes of it, and the code that it ends with."""

    id: str
    fate: str
    """early, down, killed or lasting."""
    code: int

    @property
    def script(self) -> str:
        if self.fate == "early":
            return f": {self.id}; exit {self.code}"
        return f": {self.id}; trap 'exit {self.code}' USR1; while :; do sleep 1; done"


class Stranger:
    """A process that has nothing to do with any manager, and the pid of a container that has ended.

    It blocks all signals, so that those which were sent to it can be seen.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._had = self._pending()

    def was_signalled(self) -> bool:
        """Say whether it was killed, or sent another signal."""
        return self._process.poll() is not None or self._pending() != self._had

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _pending(self) -> list[str]:
        lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.startswith(("SigPnd", "ShdPnd"))]


def draw(count: int, token: str) -> list[Program]:
    """Return N programs, of which it is known how they will end."""
    return [
        Program(f"peer-{token}-{n}", fate := _FATES[n % 10], 137 if fate == "killed" else _CODES[n % len(_CODES)])
        for n in range(count)
    ]


def find_marked(ids: Sequence[str]) -> dict[str, list[int]]:
    """Return the shells that run each program, by its mark."""
    wanted = set(ids)
    found: dict[str, list[int]] = {each: [] for each in ids}
    for pid in _list_pids():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if os.path.basename(words[0].decode()) not in {"sh", "busybox", "bash", "dash"}:
                continue
            text = b" ".join(words).decode(errors="replace")
            key = next((word.removesuffix(";") for word in text.replace("/", " ").replace(".sh", " ").split()
                        if word.removesuffix(";") in wanted), "")  # fmt: skip
            if key and not _has_ended(pid):
                found[key].append(pid)
    return found


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = TIMEOUT) -> None:
    """Wait for a condition. Raises RuntimeError if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(0.05)


def have_end(programs: Sequence[Program]) -> int:
    """While no manager is there: some end, some are killed. Return a pid that one of them had, 0 if none was there."""
    ending = {program.id: program for program in programs if program.fate in {"down", "killed"}}
    marked = find_marked(list(ending))
    for key, program in ending.items():
        for pid in marked[key]:
            os.kill(pid, signal.SIGKILL if program.fate == "killed" else signal.SIGUSR1)
    wait_until(lambda: not any(find_marked(list(ending)).values()), "the ends")
    time.sleep(1)
    return next((pids[0] for pids in marked.values() if pids), 0)


def take_pid(pid: int) -> Stranger | None:
    """Give the pid of a container that has ended to a stranger; None if nobody reaps what had it, or others take it."""
    with suppress(RuntimeError):
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"), f"process {pid} to be reaped", _REAPED_SECONDS)
        for _ in range(_PID_TRIES):
            _LAST_PID.write_text(str(pid - 1), encoding="ascii")
            process = subprocess.Popen(["env", "--block-signal", "sleep", "1000000"])
            if process.pid == pid:
                wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "the stranger")
                return Stranger(process)
            process.kill()
            process.wait()
    return None


def end_all(workdir: Path) -> None:
    """End all but this process and the first one, which reaps them, and unmount what is mounted in a directory."""
    for pid in _list_pids():
        if pid not in {1, os.getpid()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not _list_living(), "all to end")
    unmount(workdir)


def reboot(workdir: Path, volatile: Collection[Path]) -> None:
    """Do what a power cut and a boot do: all ends, what is in memory is gone, and there is another boot id."""
    end_all(workdir)
    for path in volatile:
        shutil.rmtree(path, ignore_errors=True)
    renew_run()
    boot_id = workdir / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
    subprocess.run(["mount", "--bind", str(boot_id), _BOOT_ID], check=True)


def boot_again() -> None:
    """Let the machine have its own boot id again, if it was rebooted."""
    if _BOOT_ID in _list_mounts():
        subprocess.run(["umount", _BOOT_ID], check=True)


def renew_run() -> None:
    """Have an empty /run, in this mount namespace alone: the host's keeps what is in it."""
    subprocess.run(["umount", "--lazy", "--recursive", "/run"], stderr=subprocess.DEVNULL, check=False)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/run"], check=True)


def remove_cgroups(token: str) -> None:
    """Remove the cgroups that containers of this trial have left, and those that Podman has: none that is in use."""
    for above, _, _ in os.walk("/sys/fs/cgroup", topdown=False):
        if token in os.path.basename(above) or "/libpod_parent" in above:
            with suppress(OSError):
                os.rmdir(above)


def unmount(workdir: Path) -> None:
    """Unmount all that is mounted in a directory."""
    for mount in sorted((each for each in _list_mounts() if each.startswith(f"{workdir}/")), reverse=True):
        subprocess.run(["umount", "-l", mount], check=False)


def run_inside(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command in a pid and a mount namespace of its own; return its exit status."""
    namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
    return subprocess.run([*namespaces, *command], env={**environment, _INSIDE: "1"}, check=False).returncode


def is_inside() -> bool:
    """Say whether this is already there."""
    return _INSIDE in os.environ


def be_first(main: Callable[[], None]) -> int:
    """As the first process of a pid namespace, run `main` in a child, and reap what comes; return its exit status."""
    child = os.fork()
    if not child:
        try:
            main()
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException:  # noqa: BLE001  # told, and the end of this process
            import traceback  # noqa: PLC0415

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def _list_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _list_living() -> list[int]:
    living = []
    for pid in _list_pids():
        with suppress(OSError):
            if pid not in {1, os.getpid()} and not _has_ended(pid):
                living.append(pid)
    return living


def _has_ended(pid: int) -> bool:
    """Return whether a process waits to be reaped. Raises OSError if it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def _list_mounts() -> list[str]:
    return [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
