"""Changes to containers while the engine is down: processes die, bundles are removed, changed and planted."""

import os
import secrets
import shutil
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec

from limpet.engine.drill.judge import Discrepancy, Kind
from limpet.engine.drill.script import Disaster, Disturbance, Victims
from limpet.engine.drill.truth import Truth
from limpet.engine.drill.world import Subreaper, World
from limpet.schema.layout import CONFIG_FILE, MARKER_FILE, ROOTFS, BundleMarker
from limpet.schema.status import ContainerState

_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO: the machine's own
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_LAST_PID = "/proc/sys/kernel/ns_last_pid"
_TRIES = 20
_PRECIOUS = "precious"
_ANCHOR, _KEEPER, _COPIER = "limpet-anchor", "limpet-keeper", "limpet-copier"
_VICTIMS = {
    Victims.KEEPER: (_KEEPER,),
    Victims.COPIER: (_COPIER,),
    Victims.ALL: (_ANCHOR, _KEEPER, _COPIER),  # the anchor first, or it takes over
}


class Scene(NamedTuple):
    """The place where disasters happen."""

    containers_dir: str
    quarantine_dir: str
    outside_dir: str
    """A directory that is not the engine's; links in the engine's directories point to it."""
    truth: Truth
    subreaper: Subreaper
    planted: dict[str, str]
    """Files that the drill created, in the engine's directories or outside, and what must not change."""
    happened: Counter[Disaster]
    """Disasters that need private namespaces are counted here only if they happened."""


def prepare(scene: Scene) -> None:
    """Create the files outside."""
    os.mkdir(scene.outside_dir)
    _plant(scene, scene.outside_dir, _PRECIOUS)


def disturb(scene: Scene, disturbances: Sequence[Disturbance]) -> Iterator[tuple[Disaster, str]]:
    """Make one after the other happen, and yield it with its victim. A disaster without a victim is skipped."""
    for disturbance in disturbances:
        act, find = _ACTS[disturbance.disaster]
        candidates = find(scene)
        if candidates:
            victim = candidates[int(disturbance.choice * len(candidates))]
            act(scene, victim)
            yield disturbance.disaster, victim


def kill_keepers(scene: Scene, victims: Victims) -> bool:
    """Kill processes of the keepers, those that are there; say whether there was one."""
    processes = scene.subreaper.look().processes
    found: dict[str, list[int]] = {_ANCHOR: [], _KEEPER: [], _COPIER: []}
    for process in processes.values():
        parent = processes.get(process.parent)
        is_fork = parent is not None and parent.command == _KEEPER  # of a keeper, for a moment
        if process.command in found and not (process.command == _KEEPER and is_fork):
            found[process.command].append(process.pid)
    killed = [pid for name in _VICTIMS[victims] for pid in found[name]]
    if victims is Victims.ALL or (victims is Victims.KEEPER and not found[_ANCHOR]):
        scene.truth.lose_witnesses()
    for pid in killed:
        scene.subreaper.kill(pid)
    return bool(killed)


def find_harm(scene: Scene, world: World) -> list[Discrepancy]:
    """Return what changed although it is not the engine's."""
    places = (scene.containers_dir, scene.quarantine_dir, scene.outside_dir)
    kept = {name: os.path.join(where, name) for place in places for where, _, names in os.walk(place) for name in names}
    outside = os.listdir(scene.outside_dir)
    harm = [
        (f"file {name}, which the engine did not make, {was}", now)
        for name, was in scene.planted.items()
        if (now := _describe(kept[name]) if name in kept else "gone") != was
    ]
    harm += [(f"process {pid}, a stranger, alive", "ended") for pid in world.strangers - world.processes.keys()]
    harm += [(f"{scene.outside_dir} as it was", f"{outside}")] if outside != [_PRECIOUS] else []
    return [Discrepancy("-", Kind.HARMED, expected, said) for expected, said in harm]


def _running(scene: Scene) -> list[str]:
    world = scene.subreaper.look()
    return [key for key in sorted(scene.truth.known) if world.find_leader(os.path.join(scene.containers_dir, key))]


def _with_bundle(scene: Scene) -> list[str]:
    alone = sorted(scene.truth.known.keys() - scene.truth.grouped)
    return [key for key in alone if _is_directory(os.path.join(scene.containers_dir, key))]


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _idle(scene: Scene) -> list[str]:
    floors = {key: known.floor for key, known in scene.truth.known.items()}
    return [
        key
        for key in _with_bundle(scene)
        if (floor := floors[key]) is not None and floor.state in {ContainerState.CREATED, ContainerState.EXITED}
    ]


def _new_name(_: Scene) -> list[str]:
    return [f"planted-{secrets.token_hex(4)}"]


def _kill(scene: Scene, key: str) -> int:
    pid = scene.subreaper.look().find_leader(os.path.join(scene.containers_dir, key))
    if pid:
        scene.truth.known[key].signalled = True
        scene.subreaper.kill(pid)
    return pid


def _replace(scene: Scene, key: str) -> None:
    """Kill the container, and give its pid to another process.

    Only in the drill's own pid namespace: elsewhere other processes could get chosen pids too.
    """
    pid = _kill(scene, key)
    if not pid or os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE or not os.access(_LAST_PID, os.W_OK):
        return
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.001)  # until its keeper has reaped it
    # The pid is not free while its session has members.
    while members := [each.pid for each in scene.subreaper.look().processes.values() if each.session == pid]:
        for each in members:
            scene.subreaper.kill(each)
    with suppress(OSError), open(_LAST_PID, encoding="utf-8") as file:
        last = file.read()
        for _ in range(_TRIES):
            _write(_LAST_PID, str(pid - 1))
            # The stranger is created by the call that creates containers; another fork may come first.
            stranger = os.posix_spawnp("sleep", ["sleep", "3000"], {"PATH": os.defpath}, setsid=True)
            if stranger == pid:
                scene.subreaper.keep_stranger(pid)
                scene.happened[Disaster.REPLACE] += 1
                break
            scene.subreaper.kill(stranger)
        _write(_LAST_PID, last)


def _replace_unseen(scene: Scene, key: str) -> None:
    kill_keepers(scene, Victims.ALL)
    _replace(scene, key)


def _reboot(scene: Scene, boot_id_path: str) -> None:
    """End all processes but the strangers, which came later, and change the kernel's boot id."""
    for known in scene.truth.known.values():
        known.signalled = known.unwitnessed = True
    while left := _find_descendants(scene.subreaper.look()):
        for pid in left:
            scene.subreaper.kill(pid)
    is_mounted = os.path.exists(boot_id_path)
    _write(boot_id_path, f"{uuid.uuid4()}\n")
    if not is_mounted:
        subprocess.run(["mount", "--bind", boot_id_path, _BOOT_ID], check=True)  # noqa: S607  # found through PATH
    scene.happened[Disaster.REBOOT] += 1


def _find_descendants(world: World) -> set[int]:
    return world.processes.keys() - world.strangers - {os.getpid()}


def _in_own_namespaces(scene: Scene) -> list[str]:
    """Return where a boot id can be mounted, if the drill can change it without affecting others."""
    if os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE:
        return []
    return [os.path.join(os.path.dirname(scene.outside_dir), "boot_id")]


def _remove_bundle(scene: Scene, key: str) -> None:
    scene.truth.known[key].disturbed = True
    shutil.rmtree(os.path.join(scene.containers_dir, key))


def _halve_bundle(scene: Scene, key: str) -> None:
    scene.truth.known[key].disturbed = True
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(scene.containers_dir, key, CONFIG_FILE))


def _swap_bundle(scene: Scene, key: str) -> None:
    _remove_bundle(scene, key)
    os.symlink(scene.outside_dir, os.path.join(scene.containers_dir, key))


def _plant_unmarked(scene: Scene, name: str) -> None:
    _plant_empty(scene, name)
    _plant(scene, os.path.join(scene.containers_dir, name), f"{name}.txt")


def _plant_marked(scene: Scene, name: str) -> None:
    _plant_empty(scene, name)
    marker = msgspec.json.encode(BundleMarker(limpet="container", id=name, node="local"))
    _write(os.path.join(scene.containers_dir, name, MARKER_FILE), marker.decode())
    os.mkdir(os.path.join(scene.containers_dir, name, ROOTFS))
    os.symlink(scene.outside_dir, os.path.join(scene.containers_dir, name, ROOTFS, "link"))


def _plant_empty(scene: Scene, name: str) -> None:
    os.mkdir(os.path.join(scene.containers_dir, name))


def _plant_link(scene: Scene, name: str) -> None:
    os.symlink(scene.outside_dir, os.path.join(scene.containers_dir, name))


def _plant(scene: Scene, directory: str, name: str) -> None:
    path = os.path.join(directory, name)
    _write(path, f"{name}, keep")
    scene.planted[name] = _describe(path)


def _describe(path: str) -> str:
    mode = f"mode {os.lstat(path).st_mode:o}"
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return f"{mode}, {file.read()!r}"
    except OSError as error:
        return f"{mode}, {error.strerror}"


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


_ACTS: dict[Disaster, tuple[Callable[[Scene, str], object], Callable[[Scene], list[str]]]] = {
    Disaster.KILL: (_kill, _running),
    Disaster.REPLACE: (_replace, _running),
    Disaster.REPLACE_UNSEEN: (_replace_unseen, _running),
    Disaster.REMOVE_BUNDLE: (_remove_bundle, _with_bundle),
    Disaster.HALVE_BUNDLE: (_halve_bundle, _idle),
    Disaster.SWAP_BUNDLE: (_swap_bundle, _idle),
    Disaster.PLANT_UNMARKED: (_plant_unmarked, _new_name),
    Disaster.PLANT_MARKED: (_plant_marked, _new_name),
    Disaster.PLANT_EMPTY: (_plant_empty, _new_name),
    Disaster.PLANT_LINK: (_plant_link, _new_name),
    Disaster.REBOOT: (_reboot, _in_own_namespaces),
}
"""For each disaster what it does, and its possible victims."""
