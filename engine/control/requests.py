"""What a command can ask of an engine, and what the engine then does.

A command that finds no live engine opens one and does the same with it. An engine may be killed at any instant, also
after it did what was asked and before it said so: so each request can be asked again, of the next engine.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, ClassVar

import msgspec
from msgspec.structs import replace

from limpet.engine.control.served import Served, find
from limpet.engine.lifecycle.attempts import find_earlier
from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.sandbox import Sandbox
from limpet.engine.lifecycle.stopping import DEFAULT_STOP_TIMEOUT_SECONDS
from limpet.engine.starters.abilities import Session, Stats
from limpet.recovery.report import Report
from limpet.schema.cri import PodSandboxConfig, parse_pod_sandbox_config
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import (
    InvalidInputError,
    InvalidStateError,
    LimpetError,
    NotFoundError,
    StoreDamagedError,
    WaitTimeoutError,
    quote_path,
)
from limpet.schema.release import read_version
from limpet.schema.restart import RestartKind
from limpet.schema.status import ContainerState, Reason, Status

MADE_BY = "limpet.made-by"
"""The annotation of a sandbox that was made for one container, and goes with it."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is asked. `RESULT` is the type of what comes back."""

    RESULT: ClassVar[Any] = None


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What a live engine says of itself."""

    pid: int
    node: str
    limpet: str
    """Its version."""
    starter: str


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A container, and its status now."""

    id: str
    name: str
    status: Status


class Began(msgspec.Struct, frozen=True, kw_only=True):
    """A container that was made and started, and where its output goes."""

    id: str
    sandbox_id: str
    status: Status
    log_path: str
    log_top: str
    """The directory that the log must be in."""


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """What a container uses, as `Stats` has it."""

    id: str
    name: str
    at: int
    cpu_ns: int | None
    memory_bytes: int | None
    working_set_bytes: int | None
    processes: int | None
    problem: str = ""
    """Why that is not known, if it is not."""


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """A container or sandbox that is removed, or would be."""

    kind: str
    id: str
    name: str


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What was removed, and what could not be, with the reason by id."""

    removed: tuple[Removal, ...]
    problems: dict[str, str]


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """The names of the images that were loaded."""

    names: tuple[str, ...]


class Info(Request, frozen=True, tag="info"):
    """Who the live engine is."""

    RESULT: ClassVar[Any] = Known


class CreateAndStart(Request, frozen=True, tag="run"):
    """Make a container under an id of the caller's choice, and start it; the sandbox too, if its config is given.

    Asked again, it goes on from where the first time ended.
    """

    RESULT: ClassVar[Any] = Began
    id: str
    config: dict[str, Any]
    sandbox_id: str
    sandbox_config: dict[str, Any] | None = None
    runtime: str = ""
    """The runtime handler of a sandbox that is made."""
    restart: str = RestartKind.NO.value


class Stop(Request, frozen=True, tag="stop"):
    """Stop a container, or all of a sandbox."""

    RESULT: ClassVar[Any] = tuple[Done, ...]
    id: str
    timeout: float = DEFAULT_STOP_TIMEOUT_SECONDS


class Wait(Request, frozen=True, tag="wait"):
    """Wait until a container has ended. Who asks gives up by going away."""

    RESULT: ClassVar[Any] = Done
    id: str


class Remove(Request, frozen=True, tag="remove"):
    """Forget a container or sandbox; with `force`, one that runs or holds containers too."""

    RESULT: ClassVar[Any] = tuple[Removal, ...]
    id: str
    force: bool = False


class Prune(Request, frozen=True, tag="prune"):
    """Forget the containers that have ended and, with `sandboxes`, the sandboxes that are empty."""

    RESULT: ClassVar[Any] = Pruned
    sandboxes: bool = False


class Load(Request, frozen=True, tag="load"):
    """Load the images of an archive or layout at an absolute path."""

    RESULT: ClassVar[Any] = Loaded
    path: str


class Resolve(Request, frozen=True, tag="resolve"):
    """Record that an Unknown container is gone."""

    RESULT: ClassVar[Any] = Done
    id: str
    why: str


class Recover(Request, frozen=True, tag="recover"):
    """Look at every container that has not ended, and record what is true."""

    RESULT: ClassVar[Any] = Report


class Pause(Request, frozen=True, tag="pause"):
    """Freeze a container, or let it go on."""

    RESULT: ClassVar[Any] = Done
    id: str
    is_wanted: bool


class Measure(Request, frozen=True, tag="measure"):
    """Ask what containers use; without ids, all that run."""

    RESULT: ClassVar[Any] = tuple[Used, ...]
    ids: tuple[str, ...] = ()


class Execute(Request, frozen=True, tag="execute"):
    """Open a session with a command in a container: see `frames` for what follows."""

    id: str
    args: tuple[str, ...]
    terminal: bool = False
    size: tuple[int, int] = (0, 0)
    """Rows and columns of the terminal."""


class Attach(Request, frozen=True, tag="attach"):
    """Open a session with a container's own program."""

    id: str


AnyRequest = Info | CreateAndStart | Stop | Wait | Remove | Prune | Load | Resolve | Recover | Pause | Measure
AnyStream = Execute | Attach
REQUEST = make_decoder(AnyRequest | AnyStream)


def perform(engine: Served, request: Request) -> Any:
    """Do what is asked with `engine`, and return the result. Raises LimpetError."""
    return _PERFORMERS[type(request)](engine, request)


def open_session(engine: Served, request: AnyStream) -> Session:
    """Open the session that is asked for. Raises LimpetError."""
    container = engine.get(request.id)
    if isinstance(request, Attach):
        return container.attach()
    return container.open_command(request.args, terminal=request.terminal, size=request.size)


def tell_done(container: Container, status: Status) -> Done:
    """Return a container's name with a status of it."""
    return Done(id=container.id, name=_name_of(container), status=status)


def _info(engine: Served, _: Info) -> Known:
    return Known(pid=os.getpid(), node=engine.store.node, limpet=read_version(), starter=engine.starter.name)


def _create_and_start(engine: Served, request: CreateAndStart) -> Began:
    config = None if request.sandbox_config is None else parse_pod_sandbox_config(request.sandbox_config)
    if config is not None and request.sandbox_id not in engine.store.sandbox_ids:
        _forget_unused(engine, config)
        engine.create_sandbox(config, id=request.sandbox_id, runtime_handler=request.runtime)
    sandbox = engine.get_sandbox(request.sandbox_id)
    try:
        container = _create(engine, request, sandbox)
    except BaseException:
        if config is not None:
            with suppress(LimpetError):  # it may have been made empty before: prune removes it, then
                sandbox.delete()
        raise
    if container.state is ContainerState.CREATED:
        container.start()
    return Began(
        id=container.id,
        sandbox_id=sandbox.id,
        status=container.status,
        log_path=container.metadata.log_path,
        log_top=sandbox.log_directory,
    )


def _forget_unused(engine: Served, config: PodSandboxConfig) -> None:
    """Remove the sandbox of this name that a kill has left before its container was made."""
    for sandbox in engine.list_sandboxes():
        if sandbox.metadata.name == config.metadata.name and sandbox.metadata.config.annotations.get(MADE_BY):
            with suppress(LimpetError):  # it has its container: then the name is taken, as creating will say
                sandbox.delete()


def _create(engine: Served, request: CreateAndStart, sandbox: Sandbox) -> Container:
    if request.id in engine.store:
        container = engine.get(request.id)
        if container.status.reason != Reason.START_ERROR or request.restart != RestartKind.NO:
            if not container.status.created_at and not container.status.finished_at:
                container.create()
            return container
        # An engine was killed before it let the program go, or told that it cannot be run: that is tried once more.
        container.remove()
    return engine.create_container(request.config, sandbox.id, id=request.id, restart=request.restart)


def _stop(engine: Served, request: Stop) -> tuple[Done, ...]:
    found = find(engine, request.id)
    if isinstance(found, Sandbox):
        containers = found.containers()
        found.stop(request.timeout)
        return tuple(_tell_present(containers))
    return (tell_done(found, found.stop(request.timeout)),)


def _tell_present(containers: Iterable[Container]) -> Iterator[Done]:
    for each in containers:
        with suppress(NotFoundError):  # deleted meanwhile
            yield tell_done(each, each.status)


def _wait(engine: Served, request: Wait) -> Done:
    container = engine.get(request.id)
    return tell_done(container, container.wait())


class Waiting:
    """That somebody waits for a container to end, and asks again and again whether it has."""

    def __init__(self, engine: Served, request: Wait) -> None:
        """Raise what `Engine.get` and `Container.status` raise."""
        self._since = engine.store.revision
        self.container = engine.get(request.id)
        self._name, self._seen = _name_of(self.container), self.container.status

    def look(self) -> Done | None:
        """Return how it has ended, None if it has not. Raises what `Container.wait` raises."""
        try:
            status = self.container.wait(0)
        except WaitTimeoutError:
            return None
        except NotFoundError:  # deleted before its end was looked at
            status = self.container.last_status(self._seen, self._since)
        return Done(id=self.container.id, name=self._name, status=status)


def _remove(engine: Served, request: Remove) -> tuple[Removal, ...]:
    found = find(engine, request.id)
    if isinstance(found, Sandbox):
        return tuple(_remove_sandbox(engine, found, force=request.force))
    earlier = _find_earlier(engine, found) if request.id == _name_of(found) else []
    several = [found, *earlier]  # in this order: one that is not to be removed keeps those before it
    return tuple(removal for each in several for removal in _remove_container(engine, each, force=request.force))


def _find_earlier(engine: Served, container: Container) -> Iterator[Container]:
    """Return the attempts of its name that its restart policy has made it after."""
    with suppress(StoreDamagedError):
        for key in find_earlier(engine.store, container.metadata):
            with suppress(NotFoundError):  # another command has removed it just now
                yield engine.get(key)


def _remove_container(engine: Served, container: Container, *, force: bool) -> Iterator[Removal]:
    name, sandbox_id = _name_of(container), _sandbox_of(container)
    if container.remove(force=force, timeout=0):
        yield Removal(kind="container", id=container.id, name=name)
    if sandbox_id in engine.store.sandbox_ids:
        yield from _remove_if_spent(engine, sandbox_id)


def _remove_if_spent(engine: Served, sandbox_id: str) -> Iterator[Removal]:
    """Remove a sandbox that was made for one container, unless others are in it."""
    with suppress(NotFoundError):  # another command has removed it just now
        sandbox = engine.get_sandbox(sandbox_id)
        if not sandbox.metadata.config.annotations.get(MADE_BY) or sandbox.containers():
            return
        try:
            is_removed = sandbox.delete()
        except InvalidStateError:
            if not sandbox.containers():
                raise
            return  # another command has put one into it just now
        if is_removed:
            yield Removal(kind="sandbox", id=sandbox.id, name=sandbox.metadata.name)


def _remove_sandbox(engine: Served, sandbox: Sandbox, *, force: bool) -> Iterator[Removal]:
    if force:
        sandbox.begin_stop(0)  # side by side; nothing comes in from now on
    for container in sandbox.containers() if force else ():
        yield from _remove_container(engine, container, force=True)
    if sandbox.delete():
        yield Removal(kind="sandbox", id=sandbox.id, name=sandbox.metadata.name)


def _prune(engine: Served, request: Prune) -> Pruned:
    removed: list[Removal] = []
    problems: dict[str, str] = {}
    for container in engine.list(state=ContainerState.EXITED):
        try:
            if not container.restart_at:
                removed += _remove_container(engine, container, force=False)
        except NotFoundError:  # somebody else was faster
            continue
        except LimpetError as error:
            problems[container.id] = str(error)
    for sandbox in engine.list_sandboxes() if request.sandboxes else ():
        if sandbox.containers():
            continue
        try:
            removed += _remove_sandbox(engine, sandbox, force=False)
        except NotFoundError:
            continue
        except LimpetError as error:  # a container has come into it meanwhile, for instance
            problems[sandbox.id] = str(error)
    return Pruned(removed=tuple(removed), problems=problems)


def _load(engine: Served, request: Load) -> Loaded:
    if not os.path.isabs(request.path):
        raise InvalidInputError(f"image {quote_path(request.path)}: an absolute path is needed")
    return Loaded(names=tuple(map(str, engine.images.load(request.path))))


def _resolve(engine: Served, request: Resolve) -> Done:
    container = engine.get(request.id)
    return tell_done(container, engine.declare_gone(container.id, request.why))


def _recover(engine: Served, _: Recover) -> Report:
    return engine.recover()


def _pause(engine: Served, request: Pause) -> Done:
    container = engine.get(request.id)
    return tell_done(container, container.pause() if request.is_wanted else container.resume())


def _measure(engine: Served, request: Measure) -> tuple[Used, ...]:
    if request.ids:
        return tuple(_use_of(container, container.measure()) for container in map(engine.get, request.ids))
    found = []
    for container in engine.list(state=ContainerState.RUNNING):
        try:
            found.append(_use_of(container, container.measure()))
        except LimpetError as error:
            nothing = Stats(time.time_ns(), None, None, None, None)
            found.append(replace(_use_of(container, nothing), problem=str(error)))
    return tuple(found)


def _use_of(container: Container, stats: Stats) -> Used:
    return Used(id=container.id, name=_name_of(container), **stats._asdict())


def _name_of(container: Container) -> str:
    try:
        return container.metadata.name
    except StoreDamagedError:
        return ""


def _sandbox_of(container: Container) -> str:
    try:
        return container.metadata.sandbox_id
    except StoreDamagedError:
        return ""


_PERFORMERS: dict[type[Request], Callable[..., Any]] = {
    Info: _info,
    CreateAndStart: _create_and_start,
    Stop: _stop,
    Wait: _wait,
    Remove: _remove,
    Prune: _prune,
    Load: _load,
    Resolve: _resolve,
    Recover: _recover,
    Pause: _pause,
    Measure: _measure,
}
