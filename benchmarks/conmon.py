"""runc and crun under conmon, without limpet: what is left of an OCI container's life if limpet does nothing for it.

They are given the config.json that limpet has made for such a container, so that only limpet's own work differs. As a
script would, they make a bundle with a root file system for each container, before the clock of its start runs, and
remove it after its end; as a container engine does, they wait for conmon's word on the end. Nothing is written down
that survives a power cut.
"""

import glob
import json
import os
import shutil
import subprocess
import time
from typing import Any, ClassVar

from limpet.benchmarks.contenders import UnavailableError
from limpet.benchmarks.kinds import KINDS
from limpet.benchmarks.runtimes import PROGRAM, Other, find_program, run_command, wait_for_end

_END_TIMEOUT_SECONDS = 30.0
_LOOK_AGAIN_SECONDS = 0.0005


class UnderConmon(Other):
    """create under conmon, start, delete."""

    runtime: ClassVar[str]

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self._state = os.path.join(self.directory, "state")
        self._kind = KINDS[f"limpet-{self.runtime}"]
        self._kind.require()
        self._conmon = find_program("conmon")
        self._command = [find_program(self.runtime), "--root", os.path.join(self.directory, "root")]
        self._config = self._make_config()
        self._files = self._read_files()

    def live(self) -> float:
        """Create and start a container, wait for its end, and delete it. The start is over once it was started."""
        key = self.choose_id()
        bundle = os.path.join(self.directory, key)
        self._make_bundle(bundle, key)
        began = time.perf_counter()
        try:
            pidfd = os.pidfd_open(self._create(key, bundle))
            run_command([*self._command, "start", key])
            took = time.perf_counter() - began
            wait_for_end(pidfd)
            _wait_for(os.path.join(bundle, "exits", key))
        finally:
            run_command([*self._command, "delete", "--force", key])
            shutil.rmtree(bundle)
        return took

    def close(self) -> None:
        """Remove the container whose config.json it has used, and its sandbox."""
        with self._kind.open(self._state) as engine:
            self._kind.clear(engine)

    def _make_bundle(self, path: str, key: str) -> None:
        """Make what the runtime is given: a config.json, and a root file system as limpet's containers have."""
        root = os.path.join(path, "rootfs")
        os.makedirs(os.path.join(path, "exits"))
        os.makedirs(os.path.join(root, "etc"))
        for name, content in self._files.items():
            with open(os.path.join(root, "etc", name), "wb") as file:
                file.write(content)
        linux = self._config["linux"] | {"cgroupsPath": f"/limpet-bench/{key}"}
        config = self._config | {"linux": linux, "root": self._config["root"] | {"path": root}}
        with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as file:
            json.dump(config, file)

    def _read_files(self) -> dict[str, bytes]:
        """Return what is in the /etc of the container's root file system: all files of it that are not mounted."""
        etc = os.path.join(self._config["root"]["path"], "etc")
        found = {}
        for name in os.listdir(etc):
            with open(os.path.join(etc, name), "rb") as file:
                found[name] = file.read()
        return found

    def _make_config(self) -> dict[str, Any]:
        """Return the config.json of a container of limpet's, which stays here until `close`."""
        with self._kind.open(self._state) as engine:
            self._kind.make_sandbox(engine)
            container = self._kind.create(engine, PROGRAM)
            container.start()
            container.wait(_END_TIMEOUT_SECONDS)
        (path,) = glob.glob(f"{glob.escape(self._state)}/containers/*/oci/*/config.json")
        with open(path, "rb") as file:
            config: dict[str, Any] = json.load(file)
        return config

    def _create(self, key: str, bundle: str) -> int:
        """Have conmon create a container; return the pid of its first process."""
        read, write = os.pipe2(os.O_CLOEXEC)
        program, *options = self._command
        with open(read, "rb") as answer:
            command = [
                self._conmon, "--api-version", "1", "-c", key, "-u", key, "-n", key, "-r", program,
                *(each for option in options for each in ("--runtime-arg", option)),
                "-b", bundle, "-p", f"{bundle}/pidfile", "-P", f"{bundle}/conmon-pidfile",
                "--exit-dir", f"{bundle}/exits", "--persist-dir", bundle, "-l", "none", "--log-level", "error",
                "--full-attach", "--no-new-keyring",
            ]  # fmt: skip
            environment = {"PATH": os.environ.get("PATH", os.defpath), "_OCI_SYNCPIPE": str(write)}
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[write],
                    env=environment,
                )
            finally:
                os.close(write)
            line = answer.readline()
            process.wait()
        try:
            pid = int(json.loads(line)["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"{self.runtime} under conmon does not work here: {line!r}") from error
        if pid <= 0:
            raise UnavailableError(f"{self.runtime} under conmon does not work here: {line!r}")
        return pid


class RuncUnderConmon(UnderConmon):
    """runc."""

    runtime = "runc"


class CrunUnderConmon(UnderConmon):
    """crun."""

    runtime = "crun"


def _wait_for(path: str) -> None:
    deadline = time.monotonic() + _END_TIMEOUT_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise UnavailableError(f"conmon has not written {path}")
        time.sleep(_LOOK_AGAIN_SECONDS)
