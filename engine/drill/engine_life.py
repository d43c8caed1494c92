"""A scripted life of an engine, for kills and power cuts; and the check of what a crash left.

An image is loaded and mounted, and each container goes through its whole life, in an order drawn from a seed. Each
acknowledgement contains what the caller was told. The check compares that with what the next engine reports, and both
with the actual processes: only a running container may be reported RUNNING, only an ended one EXITED, and the engine
must know every process.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from limpet.engine.drill.records import IDENTITY
from limpet.engine.drill.small_image import CONTENT, FILE, IMAGE, make_archive
from limpet.engine.drill.world import VARIABLE
from limpet.engine.engine import HOST_IMAGE, Engine
from limpet.engine.lifecycle.container import Container
from limpet.engine.state.names import CONTAINERS, QUARANTINE, SANDBOXES
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import StartError
from limpet.schema.identity import ProcessIdentity
from limpet.schema.image import ImageName
from limpet.schema.layout import TEMPORARY_PREFIX
from limpet.schema.status import EXIT_CODE_UNKNOWN, ContainerState, Reason, Status
from limpet.testing import Violation

_SANDBOX: Final = "jobs"
_PATIENCE_SECONDS: Final = 30.0


class _Program(NamedTuple):
    image: str
    command: Sequence[str]
    ends_by_itself: bool = True


_PROGRAMS: Final = {
    "brief": _Program(str(HOST_IMAGE), ["sh", "-c", "exit 3"]),
    "lasting": _Program(str(HOST_IMAGE), ["sleep", "3000"], ends_by_itself=False),
    "wrong": _Program(str(HOST_IMAGE), ["/nonexistent"]),
    "unpacked": _Program(IMAGE, ["/nonexistent"]),
}
"""The containers, by id."""


def _start(container: Container) -> None:
    with suppress(StartError):  # for containers whose program does not exist
        container.start()


def _end(container: Container) -> None:
    if _PROGRAMS[container.id].ends_by_itself:
        container.wait(_PATIENCE_SECONDS)
    else:
        container.stop(_PATIENCE_SECONDS)


def _record_start(container: Container, engine: Engine) -> None:
    """Record a process of another boot: one that a power cut has ended in any case."""
    engine.store.update(
        container.id, lambda old: replace(old, pid=IDENTITY.pid, started_at=old.created_at + 1, identity=IDENTITY)
    )


def _record_end(container: Container, engine: Engine) -> None:
    engine.store.update(
        container.id,
        lambda old: replace(old, pid=0, finished_at=old.started_at + 1, exit_code=3, reason=Reason.ERROR, message=""),
    )


_Verb = Callable[[Container, Engine], object]
_STAGES: Final = ("create", "start", "end", "release", "delete")
_VERBS: Final[Mapping[str, _Verb]] = {
    "start": lambda container, _: _start(container),
    "end": lambda container, _: _end(container),
    "release": lambda container, _: container.release(),
    "delete": lambda container, _: container.delete(),
}
_RECORDED: Final[Mapping[str, _Verb]] = {**_VERBS, "start": _record_start, "end": _record_end}
"""The same without processes."""


def _is_uncreated(status: Status) -> bool:
    return status.state is ContainerState.UNKNOWN and not status.created_at


def _is_copied(status: Status) -> bool:
    """Return whether this is told in a copy of a life's files: the process is the life's."""
    return status.reason == Reason.COPIED


def _may_end_by_itself(status: Status) -> bool:
    """Return whether a process runs for it: the container's, or in a copy the life's."""
    return status.state is ContainerState.RUNNING or _is_copied(status)


def _is_exited(status: Status) -> bool:
    return status.state is ContainerState.EXITED and not status.released


_UNDER_WAY: Final[Mapping[str, Callable[[Status | None], bool]]] = {
    "create": lambda status: (
        status is None or status.state is ContainerState.CREATED or (_is_uncreated(status) and not status.finished_at)
    ),
    "start": lambda status: status is not None and (_may_end_by_itself(status) or _is_exited(status)),
    "end": lambda status: status is not None and _is_exited(status),
    "release": lambda status: status is not None and status.released,
    "delete": lambda status: status is None,
}
"""What may be reported of a container during a stage of its life, besides what was reported before."""


class Told(msgspec.Struct, frozen=True):
    """An acknowledgement: how many steps are done, and the reported status of the last one's container."""

    done: int
    status: Status | None


_told = make_decoder(Told)


class EngineLife:
    """Containers are created, started, ended, released and deleted; the engine is closed and reopened in between.

    Without `processes` starts and exits are only recorded, as of another boot: for power cuts, and faster. The check
    then changes only what recovery changes, so that it can be interrupted by a crash too.
    """

    def __init__(self, seed: int = 0, *, processes: bool = True) -> None:
        rng = random.Random(seed)  # noqa: S311  # repeatable by its seed
        waiting = {key: list(_STAGES) for key in _PROGRAMS}
        self._steps: list[tuple[str, str]] = [("open", ""), ("load", ""), ("sandbox", "")]
        while waiting:
            key = rng.choice(sorted(waiting))
            self._steps.append((waiting[key].pop(0), key))
            if not waiting[key]:
                del waiting[key]
        self._steps.insert(rng.randrange(4, len(self._steps)), ("reopen", ""))
        self._steps += [("empty", ""), ("close", "")]
        self._has_processes = processes

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Do every step, and acknowledge each when it has returned, with the status it left."""
        engine: Engine | None = None
        for done, (verb, key) in enumerate(self._steps, 1):
            if engine is not None and verb in {"reopen", "close"}:
                engine.close()
            if verb in {"open", "reopen"}:
                engine = Engine.open(f"{directory}/state")
            elif engine is not None and verb != "close":
                self._perform(engine, directory, verb, key)
            status = engine.store.status(key) if engine is not None and key and verb != "delete" else None
            acknowledge(msgspec.json.encode(Told(done, status)))

    def _perform(self, engine: Engine, directory: str, verb: str, key: str) -> None:
        match verb:
            case "load":
                with tempfile.NamedTemporaryFile() as archive:
                    archive.write(make_archive())
                    archive.flush()
                    engine.images.load(archive.name)
            case "sandbox":
                engine.create_sandbox({"metadata": {"name": _SANDBOX}}, id=_SANDBOX)
            case "empty":
                engine.images.remove(ImageName.parse(IMAGE))
                engine.get_sandbox(_SANDBOX).delete()
            case "create":
                program = _PROGRAMS[key]
                config = {
                    "metadata": {"name": key},
                    "image": {"image": program.image},
                    "command": program.command,
                    "envs": [{"key": VARIABLE, "value": f"{os.path.realpath(directory)}/state/{CONTAINERS}/{key}"}],
                }
                engine.create_container(config, _SANDBOX, id=key)
            case _:
                (_VERBS if self._has_processes else _RECORDED)[verb](engine.get(key), engine)

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Open an engine on what is left, twice, and compare. Raises Violation."""
        told = [_told.decode(each) for each in acknowledged]
        state_dir, done = f"{directory}/state", len(told)
        verb, under_way = self._steps[done] if done < len(self._steps) else ("", "")
        if not self._has_processes:
            date_before_boot(state_dir)
        first = _look(state_dir)
        if os.path.exists(f"{state_dir}/{QUARANTINE}"):
            raise Violation("other", f"in quarantine: {os.listdir(f'{state_dir}/{QUARANTINE}')}")
        ended = {key for key, status in first.items() if status.identity and not _runs(status.identity)}
        last = {key: each.status for each, (_, key) in zip(told, self._steps[:done], strict=True)}
        for key in _PROGRAMS:
            said = first.get(key)
            if not (_follows(last.get(key), said) or (key == under_way and _UNDER_WAY[verb](said))):
                raise Violation("lost", f"after step {done}, {key}: {said}, expected {last.get(key)}")
        second = _look(state_dir)
        for key in {*first, *second}:
            _require_truth(key, first.get(key), second.get(key), has_ended=key in ended)
        _require_known_processes(state_dir, second)
        self._require_image(state_dir, done)
        if self._has_processes:
            _clear(state_dir)

    def _require_image(self, state_dir: str, done: int) -> None:
        verbs = [verb for verb, _ in self._steps[: done + 1]]
        if "empty" in verbs or "load" not in verbs[:done]:
            return
        with Engine.open(state_dir) as engine:
            if not engine.images.check(ImageName.parse(IMAGE)):
                raise Violation("lost", f"the image is missing or incomplete after step {done}")


def date_before_boot(state_dir: str) -> None:
    """Give the directories of containers and sandboxes the times that they would have after a power cut."""
    for folder in (CONTAINERS, SANDBOXES):
        with suppress(FileNotFoundError):
            for entry in os.scandir(f"{state_dir}/{folder}"):
                os.utime(entry.path, (0, 0), follow_symlinks=False)


def _follows(told: Status | None, said: Status | None) -> bool:
    """Return whether a container's reported status is the acknowledged one, or a later one it can reach by itself."""
    if told is None or said is None or not _may_end_by_itself(told):
        return said == told
    process = (said.identity, said.started_at)
    return process == (told.identity, told.started_at) and not said.released and (not said.unknown or _is_copied(said))


def _require_truth(key: str, first: Status | None, second: Status | None, *, has_ended: bool) -> None:
    """Raise Violation unless two looks agree with each other, and with the processes. `has_ended` is for the second."""
    if first is None or second is None or not _may_end_by_itself(first):
        agrees = second == first
    else:  # a process may end in between
        agrees = _follows(first, second) and second.state is (ContainerState.EXITED if has_ended else second.state)
    if not agrees:
        raise Violation("false_verdict", f"{key}: reopened, it reports {second}, not {first}")
    if second is None or second.state is not ContainerState.EXITED or second.identity is None:
        return
    if _runs(second.identity):
        raise Violation("false_verdict", f"{key} is reported as ended, but runs: {second}")
    if second.identity == IDENTITY and second.exit_code not in {3, EXIT_CODE_UNKNOWN}:
        raise Violation("false_verdict", f"{key}: an exit code that was not observed: {second}")


def _look(state_dir: str) -> dict[str, Status]:
    """Open an engine; return what it reports. Raises Violation if there are leftovers, or a bundle is incomplete."""
    with Engine.open(state_dir) as engine:
        statuses = {record.id: record.status for record in engine.store.list()}
        kept = {key for key, status in statuses.items() if not status.released}
        for folder, owners in ((CONTAINERS, kept), (SANDBOXES, set(engine.store.sandbox_ids))):
            left = set(os.listdir(f"{state_dir}/{folder}")) - owners
            if left:
                raise Violation("other", f"{folder} contains {sorted(left)}, which no container owns")
    left = {
        f"{folder}/{name}"
        for folder, _, names in os.walk(state_dir)
        for name in [*names, *os.listdir(folder)]
        if name.startswith(TEMPORARY_PREFIX)
    }
    if left:
        raise Violation("other", f"leftovers: {sorted(left)}")
    for key in kept:
        if statuses[key].created_at:
            _require_bundle(f"{state_dir}/{CONTAINERS}/{key}", _PROGRAMS[key])
    return statuses


def _require_bundle(path: str, program: _Program) -> None:
    files = {"config.json": None} | ({f"rootfs/{FILE}": CONTENT} if program.image == IMAGE else {})
    for name, content in files.items():
        try:
            with open(f"{path}/{name}", "rb") as file:
                found = file.read()
        except OSError as error:
            raise Violation("torn", f"{path}/{name}: {error.strerror}") from error
        if not found or found != (content or found):
            raise Violation("torn", f"{path}/{name} contains {found!r}")


def _runs(identity: ProcessIdentity) -> bool:
    """Return whether this same process is alive, according to the kernel, not the engine."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except OSError:
        return False
    try:
        with open(f"/proc/{identity.pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        is_same = os.fstat(descriptor).st_ino == identity.pidfd_inode or not identity.pidfd_inode
        return is_same and int(fields[19]) == identity.start_ticks and fields[0] not in {b"Z", b"X"}
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _require_known_processes(state_dir: str, said: Mapping[str, Status]) -> None:
    """Raise Violation if a process runs in a container that is not reported RUNNING; a gate gets time to close."""
    known = {key for key, status in said.items() if status.state is ContainerState.RUNNING}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while unknown := {pid: key for pid, key in _find_processes(state_dir).items() if key not in known}:
        if time.monotonic() > deadline:
            raise Violation("other", f"unknown processes are running: {unknown}")
        time.sleep(0.01)


def _find_processes(state_dir: str) -> dict[int, str]:
    """Return the containers whose bundles have running processes, by pid."""
    prefix = f"{VARIABLE}={os.path.realpath(state_dir)}/{CONTAINERS}/".encode()
    found: dict[int, str] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            for variable in file.read().split(b"\0"):
                if variable.startswith(prefix):
                    found[int(name)] = variable.removeprefix(prefix).decode()
    return found


def _clear(state_dir: str) -> None:
    """Check that work can go on: everything is ended, released and deleted, and then nothing is left."""
    here = set(_find_processes(state_dir).values())
    with Engine.open(state_dir) as engine:
        for container in engine.list():
            if _is_uncreated(container.status):
                container.create()
            if container.id in here:
                container.stop(_PATIENCE_SECONDS)
            # A process of the life whose files these are a copy of is not to be touched.
            if not _may_end_by_itself(container.status):
                container.release()
                container.delete()
        if not len(engine.store):
            for sandbox in engine.list_sandboxes():
                sandbox.delete()
        left = [
            f"{folder}/{name}" for folder in (CONTAINERS, SANDBOXES) for name in os.listdir(f"{state_dir}/{folder}")
        ]
        processes = _find_processes(state_dir)
        if (left and not len(engine.store)) or processes:
            raise Violation("other", f"left after deleting everything: {left}, {processes}")
