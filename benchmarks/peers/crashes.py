"""One crash, several managers of containers: what each says afterwards, and whether it is true.

Run by `make peers`, as root. Each manager starts N small shell programs. A fifth of them end, with codes that are
known. Then the manager is killed with SIGKILL. While it is down two fifths end by themselves, with known codes, and a
tenth is killed; the rest run on. A new manager is started and asked for its list, and that is compared with the
programs themselves, which are found in /proc by a mark in their command lines.

Podman has no manager that stays: each command opens its state anew, so nothing of it is there to be killed, and the
commands come after each other. What cannot run here is said, with its error.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

_CODES = (0, 3, 7, 42, 113)
_TIMEOUT = 120.0
_ENV = {**os.environ, "LC_ALL": "C.UTF-8"}
_RUNS = "running"


class Said(NamedTuple):
    """What a manager says of a container."""

    runs: bool
    code: int | None
    """None if it does not know, or says nothing of it."""


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


class Manager:
    """Starts containers. `workdir` is its own."""

    name = ""
    version_command: Sequence[str] = ()
    is_daemon = True

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.process: subprocess.Popen[str] | None = None

    def version(self) -> str:
        """Return its version, as it says it."""
        return call(*self.version_command).strip().splitlines()[0]

    def prepare(self, programs: Sequence[Program]) -> None:
        """Make what it needs, once."""

    def begin(self) -> None:
        """Start the manager, or start it again."""

    def start(self, program: Program) -> None:
        """Start a container."""

    def ask(self) -> Mapping[str, Said]:
        """Return what it says of all."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill it, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def clean(self) -> None:
        """Remove all, and end the manager."""


def call(*command: str, timeout: float = _TIMEOUT) -> str:
    """Run a command to its end, and return what it prints. Raises RuntimeError with what it says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=_ENV, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


_SERVE = """
import json, os, sys
from limpet import Engine, OciStarter
kind, state_dir, image = sys.argv[1:]
engine = Engine.open(state_dir, runtimes={"runc": OciStarter("runc")} if kind == "runc" else {})
handler = "runc" if kind == "runc" else ""
if not engine.list_sandboxes():
    engine.images.load(image)
    engine.create_sandbox({"metadata": {"name": "peers"}}, id="peers", runtime_handler=handler)
image = "peers:1" if kind == "runc" else "host"
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["verb"] == "start":
        config = {"metadata": {"name": asked["id"]}, "image": {"image": image},
                  "command": ["/bin/sh", "-c", asked["script"]]}
        engine.create_container(config, "peers", id=asked["id"]).start()
        print("started", flush=True)
    elif asked["verb"] == "list":
        unseen = {"Unknown", "Rebooted"}
        found = {one.id: [one.state.name, None if one.status.reason in unseen else one.status.exit_code]
                 for one in engine.list()}
        print(json.dumps(found), flush=True)
    else:
        engine.get_sandbox("peers").remove(force=True, timeout=0)
        engine.close()
        print("removed", flush=True)
"""


class Limpet(Manager):
    """limpet, with host processes or with runc."""

    kind = "process"

    def version(self) -> str:
        version = call(sys.executable, "-m", "limpet", "--version").strip()
        return version if self.kind == "process" else f"{version}; {call('runc', '--version').splitlines()[0]}"

    def begin(self) -> None:
        image = self.workdir / "image.tar"
        if not image.exists():
            image.write_bytes(make_image())
        command = [sys.executable, "-c", _SERVE, self.kind, str(self.workdir / "state"), str(image)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def start(self, program: Program) -> None:
        self._send(verb="start", id=program.id, script=program.script)

    def ask(self) -> Mapping[str, Said]:
        found = json.loads(self._send(verb="list"))
        return {key: Said(state == "RUNNING", code) for key, (state, code) in found.items()}

    def clean(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self._send(verb="clean")
            self.process.communicate(timeout=_TIMEOUT)

    def _send(self, **asked: str) -> str:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the engine has ended; see above")
        return line


class LimpetProcess(Limpet):
    name = "limpet, host processes"


class LimpetRunc(Limpet):
    name = "limpet, runc"
    kind = "runc"


class Podman(Manager):
    """Podman with runc, as Debian has it."""

    name = "Podman, runc"
    version_command = ("podman", "--version")
    is_daemon = False

    def _podman(self, *args: str) -> str:
        places = [f"--{name}={self.workdir / name}" for name in ("root", "runroot", "tmpdir")]
        return call(
            "podman", "--runtime=runc", "--storage-driver=vfs", "--cgroup-manager=cgroupfs", *places, *args
        )  # fmt: skip

    def prepare(self, programs: Sequence[Program]) -> None:  # noqa: ARG002
        self._podman("import", "-q", str(make_root(self.workdir)[1]), "peers")

    def start(self, program: Program) -> None:
        limits = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096")  # more needs a capability
        self._podman("run", "-d", "--network=none", *limits, f"--name={program.id}", "peers", "/bin/sh", "-c",
                     program.script)  # fmt: skip

    def ask(self) -> Mapping[str, Said]:
        found = json.loads(self._podman("ps", "--all", "--format=json"))
        return {
            one["Names"][0]: Said(one["State"] == _RUNS, one["ExitCode"] if one["State"] == "exited" else None)
            for one in found
        }

    def clean(self) -> None:
        self._podman("rm", "--all", "--force", "--time=0")


class Containerd(Manager):
    """containerd, asked by ctr."""

    name = "containerd, runc"
    version_command = ("containerd", "--version")

    @property
    def _socket(self) -> str:
        return str(self.workdir / "sock")

    def _ctr(self, *args: str) -> str:
        return call("ctr", "-a", self._socket, *args)

    def begin(self) -> None:
        config = self.workdir / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{self.workdir}/root"\nstate = "{self.workdir}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self._socket}"\n[ttrpc]\naddress = "{self._socket}.ttrpc"\n'
        )
        log = (self.workdir / "log").open("a")
        self.process = subprocess.Popen(["containerd", "-c", str(config)], stdout=log, stderr=log, text=True)
        wait_until(lambda: self._answers(), "containerd to answer")

    def _answers(self) -> bool:
        with suppress(RuntimeError):
            self._ctr("version")
            return True
        return False

    def start(self, program: Program) -> None:
        self._ctr("run", "-d", "--rootfs", str(make_root(self.workdir)[0]), program.id, "/bin/sh", "-c", program.script)

    def ask(self) -> Mapping[str, Said]:
        tasks = [line.split() for line in self._ctr("task", "ls").splitlines()[1:]]
        states = {words[0]: words[2] for words in tasks}
        found = {}
        for key in self._ctr("container", "ls", "-q").split():
            code = None
            if states.get(key) == "STOPPED":  # only its deletion tells the code
                command = ["ctr", "-a", self._socket, "task", "delete", key]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                told = re.search(r"exit with non-zero exit code (\d+)", done.stderr)
                code = int(told[1]) if told else None if done.returncode else 0
            found[key] = Said(states.get(key) == "RUNNING", code)
        return found

    def clean(self) -> None:
        for key in self._ctr("container", "ls", "-q").split():
            with suppress(RuntimeError):
                self._ctr("task", "delete", "-f", key)
            with suppress(RuntimeError):
                self._ctr("container", "delete", key)
        self.kill()


class Supervisor(Manager):
    """supervisord, which starts its programs itself."""

    name = "supervisor, host processes"
    version_command = ("supervisord", "--version")

    def version(self) -> str:
        return f"supervisor {super().version()}"

    def prepare(self, programs: Sequence[Program]) -> None:
        lines = [
            "[supervisord]", "nodaemon=true", "user=root", "minfds=16384",
            f"logfile={self.workdir}/log", f"pidfile={self.workdir}/pid",
            "[unix_http_server]", f"file={self.workdir}/sock",
            "[rpcinterface:supervisor]",
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        ]  # fmt: skip
        for program in programs:
            path = self.workdir / f"{program.id}.sh"
            path.write_text(program.script + "\n")
            command = f"/bin/sh {path}"
            lines += [f"[program:{program.id}]", f"command={command}", "autorestart=false", "startsecs=0"]
        (self.workdir / "conf").write_text("\n".join(lines) + "\n")

    def begin(self) -> None:
        with suppress(FileNotFoundError):
            (self.workdir / "sock").unlink()
        command = ["supervisord", "-c", str(self.workdir / "conf")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
        wait_until(lambda: self._answers(), "supervisord to answer")

    def _answers(self) -> bool:
        with suppress(OSError):
            self.ask()
            return True
        return False

    def ask(self) -> Mapping[str, Said]:
        from http.client import HTTPConnection  # noqa: PLC0415
        from socket import AF_UNIX, socket  # noqa: PLC0415
        from xmlrpc.client import ServerProxy, Transport  # noqa: PLC0415

        path = str(self.workdir / "sock")

        class Connection(HTTPConnection):
            def connect(self) -> None:
                self.sock = socket(AF_UNIX)
                self.sock.connect(path)

        class UnixTransport(Transport):
            def make_connection(self, host: Any) -> HTTPConnection:  # noqa: ARG002
                return Connection("localhost")

        server: Any = ServerProxy("http://localhost/RPC2", transport=UnixTransport())
        return {
            one["name"]: Said(one["statename"] in {"RUNNING", "STARTING"}, one["exitstatus"] if one["stop"] else None)
            for one in server.supervisor.getAllProcessInfo()
        }

    def clean(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(_TIMEOUT)


MANAGERS: tuple[type[Manager], ...] = (LimpetProcess, LimpetRunc, Podman, Containerd, Supervisor)


def make_root(workdir: Path) -> tuple[Path, Path]:
    """Return a root directory with busybox in it, and an archive of it."""
    root, archive = workdir / "rootfs", workdir / "rootfs.tar"
    if not archive.exists():
        (root / "bin").mkdir(parents=True)
        shutil.copy2(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
        for name in ("sh", "sleep"):
            (root / "bin" / name).symlink_to("busybox")
        for name in ("proc", "dev", "sys", "etc", "tmp"):
            (root / name).mkdir()
        with tarfile.open(archive, "w") as file:
            file.add(root, ".")
    return root, archive


def make_image() -> bytes:
    """Return the same as an OCI archive."""
    from limpet.engine.drill.small_image import make_archive  # noqa: PLC0415

    content = Path(shutil.which("busybox") or "/bin/busybox").read_bytes()
    return make_archive("peers:1", {"bin/busybox": content}, {"bin/sh": "busybox", "bin/sleep": "busybox"})


def find_marked(ids: Sequence[str]) -> dict[str, list[int]]:
    """Return the shells that run each program, by its mark."""
    wanted = set(ids)
    found: dict[str, list[int]] = {each: [] for each in ids}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if os.path.basename(words[0].decode()) not in {"sh", "busybox", "bash", "dash"}:
                continue
            text = b" ".join(words).decode(errors="replace")
            key = next((word.removesuffix(";") for word in text.replace("/", " ").replace(".sh", " ").split()
                        if word.removesuffix(";") in wanted), "")  # fmt: skip
            if key and Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found[key].append(int(name))
    return found


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Wait for a condition. Raises RuntimeError after two minutes."""
    deadline = time.monotonic() + _TIMEOUT
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(0.05)


def draw(count: int, token: str) -> list[Program]:
    """Return N programs: of ten two end early, four while the manager is down, one is killed then, three run on."""
    fates = ("early", "down", "lasting", "down", "killed", "early", "down", "lasting", "down", "lasting")
    return [
        Program(f"peer-{token}-{n}", fates[n % 10], 137 if fates[n % 10] == "killed" else _CODES[n % len(_CODES)])
        for n in range(count)
    ]


def try_one(kind: type[Manager], count: int, most_seconds: float) -> dict[str, Any]:
    """Have one manager start N programs, crash, and say what became of them; give up on one that starts too slowly."""
    programs = draw(count, os.urandom(3).hex())
    ids = [program.id for program in programs]
    with directory() as workdir:
        manager = kind(workdir)
        try:
            version = manager.version()
            manager.prepare(programs)
            manager.begin()
            began = time.monotonic()
            for number, program in enumerate(programs):
                if (took := time.monotonic() - began) > most_seconds:
                    raise RuntimeError(f"{number} of {count} were started in {took:.0f} s")
                manager.start(program)
            starting = time.monotonic() - began
            lasting = {program.id for program in programs if program.fate != "early"}
            wait_until(lambda: {key for key, pids in find_marked(ids).items() if pids} == lasting, "the programs")
            time.sleep(0.5)
            manager.kill()
            crash(programs)
            began = time.monotonic()
            manager.begin()
            said = manager.ask()
            took = time.monotonic() - began
            time.sleep(1)
            result = compare(programs, said, find_marked(ids))
            found = {"manager": kind.name, "version": version, "count": count, **result, "left": 0,
                     "seconds": round(took, 2), "starts_took": round(starting, 1)}  # fmt: skip
            try:
                manager.clean()
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                found["clean_error"] = str(error)
            time.sleep(1)
            return {**found, "left": sum(map(len, find_marked(ids).values()))}
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            with suppress(Exception):
                manager.clean()
            return {"manager": kind.name, "count": count, "error": str(error)}
        finally:
            with suppress(Exception):
                manager.kill()
            for pids in find_marked(ids).values():
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def crash(programs: Sequence[Program]) -> None:
    """While no manager is there: some end, some are killed."""
    marked = find_marked([program.id for program in programs])
    ending = {program.id: program for program in programs if program.fate in {"down", "killed"}}
    for key, program in ending.items():
        for pid in marked[key]:
            os.kill(pid, signal.SIGKILL if program.fate == "killed" else signal.SIGUSR1)
    wait_until(lambda: not any(find_marked(list(ending)).values()), "the ends")
    time.sleep(1)


def compare(programs: Sequence[Program], said: Mapping[str, Said], marked: Mapping[str, list[int]]) -> dict[str, int]:
    """Count what is not true."""
    counts = dict.fromkeys(
        ("lost", "said_to_run_but_ended", "said_to_have_ended_but_runs", "wrong_code", "unknown_code", "doubled"), 0
    )
    for program in programs:
        says, runs = said.get(program.id), bool(marked[program.id])
        has_ended = program.fate != "lasting"
        counts["doubled"] += len(marked[program.id]) > 1 or (has_ended and runs)
        if says is None:
            counts["lost"] += 1
        elif says.runs and has_ended and not runs:
            counts["said_to_run_but_ended"] += 1
        elif not says.runs and not has_ended:
            counts["said_to_have_ended_but_runs"] += 1
        elif says.runs:
            continue
        elif has_ended and says.code is None:
            counts["unknown_code"] += 1
        elif has_ended and says.code not in {program.code, program.code - 128 if program.code == 137 else program.code}:
            counts["wrong_code"] += 1
    return counts


@contextmanager
def directory() -> Iterator[Path]:
    """Make a directory for one manager, and remove it with what is mounted in it."""
    path = Path(tempfile.mkdtemp(prefix="limpet-peers-"))
    try:
        yield path
    finally:
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((each for each in mounts if each.startswith(str(path))), reverse=True):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    """Try all, and print a table in Markdown; with --json a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10,100", help="how many containers (default: 10,100; 1000 takes long)")
    parser.add_argument("--only", default="", help="a part of the managers' names")
    parser.add_argument(
        "--most-seconds", type=float, default=600.0, help="how long one may take to start its containers (default: 600)"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for count in map(int, options.counts.split(",")):
        for kind in MANAGERS:
            if options.only in kind.name:
                results.append(try_one(kind, count, options.most_seconds))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"machine": platform.platform(), "results": results}, indent=1))
    else:
        print_table(results)


_COLUMNS = (
    "lost", "said_to_run_but_ended", "said_to_have_ended_but_runs", "wrong_code", "unknown_code", "doubled", "left",
    "seconds",
)  # fmt: skip


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """Print the results, and what could not run."""
    print("| manager | containers | " + " | ".join(each.replace("_", " ") for each in _COLUMNS) + " |")
    print("| --- " * (len(_COLUMNS) + 2) + "|")
    for one in results:
        failed = [f"did not run: {one.get('error')}"] + [""] * (len(_COLUMNS) - 1)
        cells = failed if "error" in one else [str(one[column]) for column in _COLUMNS]
        print(f"| {one['manager']} | {one['count']} | " + " | ".join(cells) + " |")
    print()
    for one in {one["manager"]: one for one in results}.values():
        print(f"- {one['manager']}: {one.get('version') or 'error: ' + one['error']}")


if __name__ == "__main__":
    main()
