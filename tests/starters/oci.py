"""What the tests of the OCI starter share: an image of busybox, engines with runc and crun, looks at processes."""

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from limpet.engine import Engine
from limpet.engine.starters.oci import OciStarter, sandboxes
from limpet.engine.starters.oci.run_directory import Processes, list_runs
from limpet.engine.starters.oci.sandboxes import PINS
from limpet.engine.starters.oci.tools import Tools, command_of
from limpet.recovery.host import read_stat
from limpet.recovery.mounts import find_mounts
from limpet.schema.identity import ProcessIdentity
from tests import oci_layout
from tests.conftest import require_namespaces, require_tools

RUNTIMES = ("runc", "crun")
each_runtime = pytest.mark.parametrize("runtime", ["runc", pytest.param("crun", marks=pytest.mark.long)])
"""With runc in `make test`, and with crun in the gate."""
TOOLS = ("conmon", "runc", "crun", "busybox")
APPLETS = ("sh", "cat", "ls", "id", "sleep", "test", "env", "true", "false", "echo", "grep", "pwd", "mount", "hostname")
PASSWD = b"root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/home/web:/bin/sh\n"
GROUP = b"root:x:0:\nweb:x:1001:\nextra:x:1002:web\n"

NEEDS = struct.pack("<5I", 0x02000001, 1 << 12, 0, 0, 0).decode()
"""A file's capabilities: its program counts on CAP_NET_ADMIN."""

_INIT = ProcessIdentity(pid=4711, start_ticks=1, boot_id="boot", pidfd_inode=2, pid_namespace=3)
PROCESSES = Processes(
    init=_INIT,
    monitor=replace(_INIT, pid=4712),
    held_program=(1, 2),
    entry="/run/x/one",
    oci_id="one",
    cgroups=("0::/limpet/one",),
    cgroup="/limpet/one",
    flaw="why",
    has_own_pids=False,
    is_plain=True,
)
"""What a start may have written down; none of these processes is there."""


def load_busybox(engine: Engine, directory: Path, *, needs_root: bool = True, **config: Any) -> None:
    """Load an image `box:1` of busybox, with programs that no kernel executes beside it."""
    require_tools(*TOOLS)
    if os.geteuid() and needs_root:
        pytest.skip("OCI containers need root")
    require_namespaces()
    busybox = Path("/usr/bin/busybox" if os.path.exists("/usr/bin/busybox") else "/bin/busybox").read_bytes()
    members = [
        *(oci_layout.directory(name) for name in ("bin", "tmp", "etc", "proc", "sys", "dev", "work")),
        oci_layout.member("bin/busybox", busybox, mode=0o755),
        *(oci_layout.symlink(f"bin/{name}", "busybox") for name in APPLETS),
        oci_layout.member("bin/garbage", b"\x01garbage", mode=0o755),
        oci_layout.member("bin/lost", b"#!/no/such/interpreter\n", mode=0o755),
        oci_layout.member("bin/private", busybox, mode=0o700),
        oci_layout.member("bin/counting", busybox, mode=0o755, pax_headers={"SCHILY.xattr.security.capability": NEEDS}),
        oci_layout.member("bin/short", busybox[:300], mode=0o755),
        oci_layout.member("bin/shorter", busybox[:30], mode=0o755),
        oci_layout.member("bin/nul", b"#!/bin/no\0such\n", mode=0o755),
        oci_layout.member("bin/itself", b"#!/bin/itself\n", mode=0o755),
        oci_layout.member("etc/passwd", PASSWD),
        oci_layout.member("etc/group", GROUP),
    ]
    layout = oci_layout.Layout(directory)
    layout.add_image([oci_layout.tar(*members)], "box:1", configuration={"config": {"Cmd": ["/bin/sh"], **config}})
    engine.images.load(str(directory))


def open_engine(state_dir: str, **options: Any) -> Engine:
    """Open an engine with both runtimes."""
    return Engine.open(state_dir, runtimes={name: OciStarter(name) for name in ("runc", "crun")}, **options)


@contextmanager
def busybox_engine(state_dir: str, directory: Path, sandbox: Mapping[str, Any] | None = None) -> Iterator[Engine]:
    """An engine with the image and, if a config is given, a sandbox for each runtime; nothing is left afterwards."""
    with open_engine(state_dir) as opened:
        load_busybox(opened, directory / "image")
        for name in RUNTIMES if sandbox is not None else ():
            opened.create_sandbox({"metadata": {"name": name}, **(sandbox or {})}, id=name, runtime_handler=name)
        yield opened
        for container in opened.list():
            if container.status.pid:
                container.stop(0)
            container.release()
    end_everything(state_dir)


def config(name: str, script: str = "", **fields: Any) -> dict[str, Any]:
    """A container of `box:1` that runs a shell script."""
    command = {"command": ["/bin/sh", "-c", script]} if script else {}
    return {"metadata": {"name": name}, "image": {"image": "box:1"}, "log_path": f"{name}.log", **command, **fields}


def processes_of(state_dir: str, container_id: str) -> Processes:
    """The processes that the container's start has written down."""
    (run,) = list_runs(os.path.join(state_dir, "containers", container_id))
    found = run.read_processes()
    assert found is not None
    return found


def is_over(pid: int) -> bool:
    """Say whether a process has ended; its parent may not have reaped it."""
    try:
        return read_stat(pid)[0] == b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def runtime_entries(state_dir: str, runtime: str) -> list[str]:
    """What the runtime still has of containers of this state directory."""
    above = Path(state_dir, "oci", runtime)
    return sorted(entry.name for root in above.iterdir() for entry in root.iterdir()) if above.is_dir() else []


def end_everything(state_dir: str) -> None:
    """Have the runtimes delete what they still have of containers of a state directory, which ends their conmons.

    What its sandboxes hold is freed, too.
    """
    for name in RUNTIMES:
        command = command_of(Tools().find(name))
        for entry in Path(state_dir, "oci", name).glob("*/*"):
            subprocess.run([*command, "--root", str(entry.parent), "delete", "-f", entry.name], check=False, timeout=30)
    free_sandboxes(state_dir)


def free_sandboxes(state_dir: str) -> None:
    """Free what the sandboxes of a state directory still hold."""
    for root in Path(state_dir, "oci").glob("*/*"):
        free_pins(root.name)


def free_pins(root_name: str) -> None:
    """Free what is pinned for a runtime's own directory of this name."""
    pins = os.path.join(PINS, root_name)
    for mount in find_mounts(pins):
        if os.path.basename(mount) == "pid":
            sandboxes._end_pids(mount)  # or its first process would stay for ever
        subprocess.run(["umount", "-l", mount], check=True)
    shutil.rmtree(pins, ignore_errors=True)
