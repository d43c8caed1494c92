"""The managers that are compared: how each is begun, starts a container, is asked, and is killed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from programs import TIMEOUT, Program, wait_until

_ENV = {**os.environ, "LC_ALL": "C.UTF-8"}
_RUNS = "running"


class Said(NamedTuple):
    """What a manager says of a container."""

    runs: bool
    code: int | None
    """None if it does not know, or says nothing of it."""


class Manager:
    """Starts containers. `workdir` is its own."""

    name = ""
    version_command: Sequence[str] = ()
    volatile: ClassVar[Sequence[str]] = ()
    """What of its directory is in memory on a machine, in /run, and so gone after a boot."""

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


def call(*command: str, timeout: float = TIMEOUT) -> str:
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
            self.process.communicate(timeout=TIMEOUT)

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
    """Podman with runc, as Debian has it. Nothing of it stays: what is killed is the command that is at work."""

    name = "Podman, runc"
    version_command = ("podman", "--version")
    volatile = ("runroot", "tmpdir")

    def _podman(self, *args: str) -> str:
        places = [f"--{name}={self.workdir / name}" for name in ("root", "runroot", "tmpdir")]
        command = ["podman", "--runtime=runc", "--storage-driver=vfs", "--cgroup-manager=cgroupfs", *places, *args]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_ENV) as process:
            self.process = process
            output, error = process.communicate(timeout=TIMEOUT)
        if process.returncode:
            raise RuntimeError(f"podman {' '.join(args)[:200]}: {error.strip()[-400:]}")
        return output

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
    volatile = ("state", "sock", "sock.ttrpc")
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
    volatile = ("sock", "pid")
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
            self.process.wait(TIMEOUT)


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
