"""A drill with containers of an OCI runtime: the same plan and the same truth, with other programs and other victims.

Every container is of an image of busybox, and its program is the first process of a pid namespace: signals that it
sends to itself do nothing. In place of the keeper, conmons are killed, and runtimes amid what they do.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress

from msgspec.structs import replace

from limpet.engine.drill.disasters import Scene
from limpet.engine.drill.script import Disaster, Planned, Program, Round, Victims
from limpet.engine.drill.small_image import make_archive
from limpet.engine.engine import HOST_IMAGE, Engine
from limpet.engine.images import DirectoryImageStore
from limpet.engine.starters.oci import OciStarter
from limpet.engine.state.names import CONTAINERS, SANDBOXES
from limpet.schema.errors import LimpetError, NotFoundError, UnsupportedError

RUNTIMES = ("runc", "crun")
_MODULE = "limpet.engine.drill.runtimes"
_APPLETS = ("sh", "sleep", "kill", "true")
_CONMON = "conmon"
_LEFT_ALONE = {Disaster.KILL, Disaster.PLANT_UNMARKED, Disaster.PLANT_MARKED, Disaster.PLANT_EMPTY, Disaster.PLANT_LINK}
"""A bundle holds what conmon has written: who removes it takes the exit code away, which the plan does not know of."""


def require_runtime(runtime: str) -> None:
    """Raise UnsupportedError, with what to install, if such containers cannot be run here."""
    for program in (runtime, _CONMON, "busybox"):
        if shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is None:
            raise UnsupportedError(f"{program} is not installed; on Debian: apt-get install {program}")
    if os.geteuid():
        raise UnsupportedError("a drill with an OCI runtime needs root")


def factory_of(runtime: str) -> str:
    """Return what opens an engine with this runtime, as `run_drill` takes it."""
    return f"{_MODULE}:open_with_{runtime}"


def open_with_runc(state_dir: str) -> Engine:
    """Open an engine whose containers are runc's."""
    return _open(state_dir, "runc")


def open_with_crun(state_dir: str) -> Engine:
    """Open an engine whose containers are crun's."""
    return _open(state_dir, "crun")


def _open(state_dir: str, runtime: str) -> Engine:
    images_dir = os.path.join(os.path.dirname(state_dir), "images")
    images = DirectoryImageStore(images_dir)
    try:
        images.manifest(HOST_IMAGE)
    except NotFoundError:
        busybox = shutil.which("busybox") or ""
        with open(busybox, "rb") as file:
            content = file.read()
        links = {f"bin/{name}": "busybox" for name in _APPLETS}
        path = f"{images_dir}.{os.getpid()}.tar"
        with open(path, "wb") as file:
            file.write(make_archive(str(HOST_IMAGE), {"bin/busybox": content}, links))
        images.load(path)
        os.unlink(path)
    return Engine.open(state_dir, starter=OciStarter(runtime), images=images)


def adapt(planned: Round) -> Round:
    """Return a round with programs that an image of busybox has, and the codes that they have there."""
    return replace(
        planned,
        containers=tuple(Planned(each.id, _adapt(each.program)) for each in planned.containers),
        disturbances=tuple(each for each in planned.disturbances if each.disaster in _LEFT_ALONE),
    )


def _adapt(program: Program) -> Program:
    if program.codes == {17}:
        return replace(program, argv=("sh", "-c", "sleep 0.1; exit 17"))
    if program.codes & {137, 138}:
        return replace(program, codes=frozenset({0}))
    return program


def kill_helpers(scene: Scene, runtime: str, victims: Victims) -> bool:
    """Kill conmons, runtimes amid what they do, or both; say whether there was one."""
    processes = scene.subreaper.look().processes.values()
    conmons = [process.pid for process in processes if process.command == _CONMON]
    # The first process of a container has a runtime's name, too, until it is let go: it is not one that is at work.
    runtimes = [process.pid for process in processes if process.command == runtime and _is_outside(process.pid)]
    chosen = {
        Victims.KEEPER: conmons[::2],
        Victims.COPIER: runtimes,
        Victims.ALL: [*conmons, *runtimes],
    }[victims]
    for pid in chosen:
        known = scene.truth.known.get(_container_of(pid)) if pid in conmons else None
        if known is not None:
            known.unwitnessed = True
        scene.subreaper.kill(pid)
    return bool(chosen)


def name_helpers(runtime: str, victims: Victims) -> str:
    """Return what `kill_helpers` kills, in words."""
    return {Victims.KEEPER: "conmons", Victims.COPIER: runtime, Victims.ALL: f"conmons, {runtime}"}[victims]


def _is_outside(pid: int) -> bool:
    """Say whether a process is in no container's pid namespace."""
    with suppress(OSError):
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), os.stat("/proc/self/ns/pid"))
    return False


def _container_of(pid: int) -> str:
    """Return the id of the container that a conmon is for."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
        words: Sequence[str] = file.read().split("\0")
        return words[words.index("-c") + 1]
    return ""


def clean(state_dir: str, runtime: str) -> None:
    """Free what containers and sandboxes of the drill still hold: cgroups, and pins in /run."""
    starter = OciStarter(runtime)
    starter.open(state_dir)
    starter.end_leftovers(lambda _: True)
    with suppress(FileNotFoundError):
        for name in os.listdir(os.path.join(state_dir, CONTAINERS)):  # what has ended is a release's affair
            with suppress(LimpetError):
                starter.release(name)
    with suppress(FileNotFoundError):
        for name in os.listdir(os.path.join(state_dir, SANDBOXES)):
            with suppress(LimpetError):
                starter.vacate(name)
