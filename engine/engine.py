"""The engine: opened on a state directory, it knows what is true of every container, and runs new ones."""

import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, Self

from msgspec.structs import replace

from limpet.engine.control import ControlServer
from limpet.engine.images import DirectoryImageStore, ImageStore
from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.expiry import require_expiry
from limpet.engine.lifecycle.follow_ups import FollowUps
from limpet.engine.lifecycle.life import Life
from limpet.engine.lifecycle.limits import is_changing_limits
from limpet.engine.lifecycle.prune import Pruned, prune
from limpet.engine.lifecycle.releasing import discard, take_back
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.lifecycle.sandbox import Sandbox
from limpet.engine.lifecycle.starting import is_in_stopped_sandbox
from limpet.engine.lifecycle.stopping import DEFAULT_STOP_TIMEOUT_SECONDS, begin_stop, resume_stop
from limpet.engine.lifecycle.strict import refuse_unapplied, refuse_unapplied_sandbox
from limpet.engine.reconcile import dispose, judge_orphans, recover, reexamine
from limpet.engine.starters import (
    Starter,
    Starters,
    choose_log_path,
    choose_stop_signal,
    make_probe,
)
from limpet.engine.state.clock import now
from limpet.engine.state.descriptors import raise_descriptor_limit, system_errors_told
from limpet.engine.state.durable import make_directory
from limpet.engine.state.entries import require_utf8, resolve_directory
from limpet.engine.state.fleet_choice import FLEET_TIMEOUT_SECONDS, FleetChoice
from limpet.engine.state.names import CONTAINERS, IMAGES, SANDBOXES
from limpet.engine.state.process_bound import ProcessBound
from limpet.engine.state.steps import run_whole
from limpet.engine.state.surroundings import require_system_calls
from limpet.engine.state.turn import Attempt, open_in_parts, require_wait
from limpet.engine.store import Listing, Store
from limpet.recovery.evidence import Process
from limpet.recovery.host import read_boot_id, read_pid_namespace
from limpet.recovery.looks import LOOK_TIMEOUT_SECONDS
from limpet.recovery.probe import Probe
from limpet.recovery.queues import Queue
from limpet.recovery.report import Report
from limpet.recovery.rules import Action, Verdict
from limpet.recovery.thread import Thread
from limpet.schema.cri import (
    ContainerConfig,
    PodSandboxConfig,
    PodSandboxMetadata,
    parse_container_config,
    parse_pod_sandbox_config,
)
from limpet.schema.errors import (
    AlreadyExistsError,
    DiskFullError,
    InvalidInputError,
    NotFoundError,
    ResourcesError,
    StateDirectoryError,
    UnsupportedError,
    quote,
    quote_path,
)
from limpet.schema.file_name import find_owners
from limpet.schema.history import Transition
from limpet.schema.image import ImageName, MountType
from limpet.schema.metadata import DEFAULT_NODE, Metadata, SandboxMetadata, new_id, require_id, require_text
from limpet.schema.restart import RestartKind, parse_restart_policy
from limpet.schema.sandbox_status import SandboxState, SandboxStatus, require_namespaces
from limpet.schema.status import ContainerState, Status
from limpet.schema.telling import get_log

_log = get_log("limpet.engine")
HOST_IMAGE = ImageName("host")
"""The built-in image: no layers, the host's own programs."""
_SIDE_BY_SIDE = 16
"""How many sandboxes are set right at a time."""


class Engine(ProcessBound):
    """Containers whose state survives a crash. Open it with `Engine.open`; thread-safe.

    Closing the engine leaves its containers running; the next one that is opened finds them again.
    """

    recovery: Report
    """What the last recovery pass found."""

    def __init__(
        self, store: Store, images: ImageStore, starters: Starters, look_timeout: float, control: ControlServer
    ) -> None:
        self.store = store
        self._control = control
        self._containers_dir = store.directory.join(CONTAINERS)
        self._sandboxes_dir = store.directory.join(SANDBOXES)
        self._look_timeout = look_timeout
        self._closing = threading.Lock()
        self._naming = threading.Lock()  # held while a sandbox is looked for, and made if there is none
        self._is_closed = False
        self._pid = os.getpid()
        self._actors = {
            Action.ADOPT: self._adopt,
            Action.REMOVE_BUNDLE: self._remove_bundle,
            Action.END_HELD: self._end_held,
        }
        self._runtime = Runtime(
            follow_up=lambda entry: self._follow_ups.look(entry),  # noqa: PLW0108  # it is made after this
            store=store,
            images=images,
            starters=starters,
            containers_dir=self._containers_dir,
            sandboxes_dir=self._sandboxes_dir,
            reexamine=self._reexamine,
        )
        self._follow_ups = FollowUps(self._runtime)

    @classmethod
    def open(
        cls,
        state_dir: str | os.PathLike[str],
        *,
        node: str = DEFAULT_NODE,
        images: ImageStore | None = None,
        starter: Starter | None = None,
        runtimes: Mapping[str, Starter] | None = None,
        inherit_env: Iterable[str] = (),
        look_timeout: float = LOOK_TIMEOUT_SECONDS,
        wait: float = 0,
        fleet: str = "",
        fleet_ack: str = "async",
        fleet_timeout: float = FLEET_TIMEOUT_SECONDS,
    ) -> Self:
        """Lock the state directory, migrate, recover, and return an engine whose `recovery` says what it found.

        While another has it open, the lock is waited for, `wait` seconds at most.

        `runtimes` are the starters of sandboxes that name a runtime handler, by that name; `starter` runs the
        containers of all others, as processes of this host if it is not given.

        `fleet` and what follows are those of `Store.open`. The opening itself does not wait for a fleet.

        In a recovery pass each look at a container may take `look_timeout` seconds; one that takes longer makes that
        container Unknown.

        This process's soft limit of file descriptors is raised to the hard one; containers get the original limits.
        Containers of the `host` image get PATH, HOME and the like of this process's environment, and those variables
        that `inherit_env` names; containers of other images nothing of it.

        Raises StateDirectoryLockedError if another engine has it open, ResourcesError if no file descriptors are left,
        InvalidInputError for names in `inherit_env` that are none or beside a starter of your own, and for two
        starters of one name, UnsupportedError where gevent or eventlet has replaced the system's threads or calls in
        this process, and the other errors of `Store.open`.
        """
        if starter is not None and inherit_env:
            raise InvalidInputError("inherit_env: give it to the starter that you open the engine with")
        require_system_calls()
        require_wait(wait)
        require_wait(look_timeout, "look_timeout")
        choice = FleetChoice(fleet, fleet_ack, fleet_timeout)
        raise_descriptor_limit()

        # Told on the thread that does it, where no signal reaches: what a handler raises may be an OSError, too.
        def choose() -> Starters:
            with system_errors_told("the starters"):  # which are loaded now
                return Starters(starter, runtimes, inherit_env)

        chosen = run_whole(choose)
        attempt: Attempt[Self] = Attempt()

        def open_whole(part: float) -> None:
            open_it = partial(cls._open, state_dir, node, images, chosen, look_timeout, part, choice)

            def run() -> None:
                with system_errors_told(f"state directory {quote_path(state_dir)}"):
                    attempt.run(open_it)

            run_whole(run)

        try:
            open_in_parts(open_whole, wait)
        except BaseException:
            try:
                attempt.discard()
            except BaseException:  # interrupted again, perhaps before it began
                attempt.discard()
                raise
            raise
        return attempt.opened[0]

    @classmethod
    def _open(
        cls,
        state_dir: str | os.PathLike[str],
        node: str,
        images: ImageStore | None,
        starters: Starters,
        look_timeout: float,
        wait: float,
        fleet: FleetChoice,
    ) -> Self:
        path = resolve_directory(state_dir)
        require_utf8(path)
        store = Store.open(
            path,
            node=node,
            wait=wait,
            fleet=fleet.url,
            fleet_ack=fleet.ack,
            fleet_timeout=fleet.timeout,
        )
        try:
            for name in (CONTAINERS, SANDBOXES):
                make_directory(store.directory.join(name))
            if images is None:
                images = DirectoryImageStore(store.directory.join(IMAGES))
                images.register_builtin(HOST_IMAGE)
            starters.open(store.directory.path)
            control = ControlServer.listen(store.directory.path)
        except BaseException:
            store.close()
            starters.close()
            raise
        try:
            engine = cls(store, images, starters, look_timeout, control)
        except BaseException:
            control.leave()
            control.close()
            store.close()
            starters.close()
            raise
        try:
            with store.fleet.later():
                engine._recover()  # a class method of its own class
            control.serve(engine)
        except BaseException:
            engine.close()
            raise
        return engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Engine on {self.store!r}>"

    @property
    def images(self) -> ImageStore:
        """The images that containers are made from."""
        return self._runtime.images

    @property
    def starter(self) -> Starter:
        """What starts its containers."""
        return self._runtime.starters.default

    def close(self) -> None:
        """Stop watching and close the store; the containers run on. Who waits gets ClosedError. May be repeated.

        In a finalizer at the end of the interpreter it is left to that end: the threads that it waits for run no more.
        """
        if os.getpid() == self._pid and not sys.is_finalizing():
            self._runtime.step(self._close)

    def _close(self) -> None:
        with self._closing:  # a second caller waits until the first is done
            if not self._is_closed:
                self._control.leave()
                self._runtime.close()
                try:
                    self.store.close()
                finally:  # on a full disk, for example: who waits, and who asks by the socket, is told all the same
                    self._runtime.ring_all()
                    self._control.close()
                self._is_closed = True

    def create_sandbox(
        self,
        config: PodSandboxConfig | bytes | str | Mapping[str, Any],
        *,
        id: str | None = None,
        strict: bool = False,
        runtime_handler: str = "",
        namespaces: Mapping[str, str] | None = None,
        addresses: Iterable[str] = (),
        extra: Mapping[str, Any] | None = None,
        expires_at: int = 0,
    ) -> Sandbox:
        """Make a sandbox from a CRI PodSandboxConfig, which may be given as JSON. It is then READY.

        `namespaces` are the paths of those that you have made for it, by type as in the OCI runtime spec, and
        `addresses` its IP addresses, the primary one first; `extra` is yours. They are written down and told;
        `Sandbox.update` changes them. At `expires_at`, nanoseconds since the epoch, it is stopped and removed with its
        containers.

        What the config asks for and the starter does not do is in the status of each container; with `strict` it is
        refused here. `runtime_handler` names the starter of its containers, one of `runtimes` of `open`.

        Raises InvalidInputError, AlreadyExistsError if its id is taken, or its name, namespace, uid and attempt.
        """
        if isinstance(addresses, str) or not isinstance(addresses, Iterable):
            raise InvalidInputError(f"addresses {quote(addresses)}: give a list of them")
        require_expiry(expires_at)
        require_namespaces({} if namespaces is None else namespaces)
        status = SandboxStatus(
            namespaces=namespaces or {}, addresses=tuple(addresses), extra=extra or {}, expires_at=expires_at
        )
        return self._runtime.step(
            lambda: self._create_sandbox(parse_pod_sandbox_config(config), id, runtime_handler, status, strict=strict),
            undo=Sandbox.take_back,
        )

    def _create_sandbox(
        self,
        config: PodSandboxConfig,
        id: str | None,
        runtime_handler: str = "",
        status: SandboxStatus = SandboxStatus(),  # noqa: B008  # frozen
        *,
        strict: bool = False,
    ) -> Sandbox:
        starter = self._runtime.starters.choose(runtime_handler)
        if status.expires_at:
            self._runtime.begin_timetable()
        key = new_id() if id is None else require_id(id)
        metadata = SandboxMetadata(
            id=key,
            name=config.metadata.name,
            config=config,
            created_at=now(),
            root_dir=self._runtime.sandbox_path(key),
            runtime_handler=runtime_handler,
        )
        choose_log_path(config.log_directory or "/", "check")
        if strict:
            refuse_unapplied_sandbox(starter, metadata, status.namespaces)
        with self._runtime.exclusive(key):
            self.store.add_sandbox(metadata, status)  # which refuses an id that can be none
            sandbox = Sandbox(self._runtime, metadata)
            try:
                sandbox.make()
            except BaseException:
                sandbox.discard()
                raise
        if status.expires_at:
            self._runtime.note_sandbox(key)
        return sandbox

    def get_or_create_sandbox(
        self, config: PodSandboxConfig | bytes | str | Mapping[str, Any], *, id: str | None = None
    ) -> Sandbox:
        """Return the READY sandbox with the name, namespace and uid of this config; make it if there is none.

        One that is there stays as it is, whatever else the config says. Beside one that is NOTREADY, as after a reboot,
        the next attempt is made; the config's attempt is the first that is meant. `id` is that of one that is made.
        Raises InvalidInputError, AlreadyExistsError if that id is another's.
        """
        parsed = parse_pod_sandbox_config(config)

        def get_or_create() -> Sandbox:
            with self._naming:
                ready, attempt = self._find_attempt(parsed.metadata)
                if ready is not None:
                    return ready
                wanted = replace(parsed, metadata=replace(parsed.metadata, attempt=attempt))
                try:
                    return self._create_sandbox(wanted, id)
                except AlreadyExistsError:  # somebody has just made it, perhaps; or the id is another's
                    ready, _ = self._find_attempt(parsed.metadata)
                    if ready is None:
                        raise
                    return ready

        return self._runtime.step(get_or_create)

    def _find_attempt(self, asked: PodSandboxMetadata) -> tuple[Sandbox | None, int]:
        """Return the READY sandbox with this name, if there is one, and the attempt that comes next."""
        attempt = asked.attempt
        for sandbox in self.list_sandboxes():
            named = sandbox.metadata.config.metadata
            if replace(named, attempt=asked.attempt) != asked or named.attempt < asked.attempt:
                continue
            if sandbox.state is SandboxState.READY:
                return sandbox, attempt
            attempt = max(attempt, named.attempt + 1)
        return None, attempt

    def create_container(
        self,
        config: ContainerConfig | bytes | str | Mapping[str, Any],
        sandbox: Sandbox | str,
        *,
        id: str | None = None,
        mount_type: MountType = MountType.PLAIN,
        strict: bool = False,
        restart: str = RestartKind.NO,
        expires_at: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> Container:
        """Make a container from a CRI ContainerConfig, which may be given as JSON, in a sandbox. It is then CREATED.

        The sandbox is given itself, or as to `get_sandbox`.
        What the config asks for and the starter does not do is in the status, `unapplied`; with `strict` it is refused.
        `restart` is `no`, `on-failure`, `on-failure:3`, `always` or `unless-stopped`: a restart is the next attempt of
        the same name, a container of its own. At `expires_at`, nanoseconds since the epoch, it is stopped and released.
        `extra` is yours, and is kept with the status.

        Raises InvalidInputError, NotFoundError for the sandbox or the image, AlreadyExistsError for id or name.
        """

        def create() -> Container:
            container = self.add_container(
                config, sandbox, id=id, strict=strict, restart=restart, expires_at=expires_at, extra=extra
            )
            try:
                container.create(mount_type)
            except BaseException:
                discard(container.life)
                raise
            return container

        return self._runtime.step(create, undo=lambda made: take_back(made.life))

    def add_container(
        self,
        config: ContainerConfig | bytes | str | Mapping[str, Any],
        sandbox: Sandbox | str,
        *,
        id: str | None = None,
        strict: bool = False,
        restart: str = RestartKind.NO,
        expires_at: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> Container:
        """Write down a container that is not created yet; `Container.create` makes its bundle.

        With `strict`, InvalidInputError names each field that asks for what the starter does not do.
        """
        config = parse_container_config(config)
        place = self._find_place(sandbox)
        manifest = self.images.manifest(ImageName.parse(config.image.image))
        starter = self._runtime.starters.choose(place.metadata.runtime_handler)
        key = new_id() if id is None else require_id(id)
        metadata = Metadata(
            id=key,
            name=config.metadata.name,
            sandbox_id=place.id,
            config=config,
            image_manifest=manifest,
            log_path=choose_log_path(place.log_directory, config.log_path),
            stop_signal=choose_stop_signal(config, manifest.config),
            root_dir=self._runtime.bundle_path(key),
            starter=starter.name,
            restart_policy=str(parse_restart_policy(restart)),
        )
        require_expiry(expires_at)
        if restart != RestartKind.NO or expires_at:
            self._runtime.begin_timetable()
        if strict:
            refuse_unapplied(starter, metadata, place.metadata, place.status.namespaces)
        container = Container(self._runtime, key)
        container.life.metadata = metadata  # as it is written: it is not read back
        self.store.add(metadata, Status(expires_at=expires_at, extra=extra or {}))
        if expires_at:
            self._runtime.note_container(key)
        return container

    def _find_place(self, sandbox: Sandbox | str) -> Sandbox:
        """Return a sandbox as it is here: one that is given itself may be another engine's, or of an id made anew."""
        if not isinstance(sandbox, Sandbox):
            return self.get_sandbox(sandbox)
        self.store.sandbox_status(sandbox.id)  # there is one with exactly this id: no name is meant
        return self.get_sandbox(sandbox.id)

    def get(self, container_id: str) -> Container:
        """Return the container with this id, else with this name, else the one whose id begins with it.

        Of several attempts of a name in one sandbox the newest is meant. Raises NotFoundError, or AmbiguousError if
        several are meant.
        """
        return Container(self._runtime, self.store.get(container_id).id)

    def list(
        self,
        *,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        state: ContainerState | str | None = None,
        labels: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "Listing[Container]":
        """Return the containers that match all that is given; see `Store.list`."""
        records = self.store.list(id=id, name=name, sandbox_id=sandbox_id, state=state, labels=labels, extra=extra)
        return Listing((Container(self._runtime, record.id) for record in records), records.revision)

    def get_sandbox(self, sandbox_id: str) -> Sandbox:
        """Return the sandbox with this id, else with this name, else the one whose id begins with it.

        Raises NotFoundError, AmbiguousError if several are meant, StoreDamagedError.
        """
        return Sandbox(self._runtime, self.store.get_sandbox(sandbox_id))

    def list_sandboxes(self) -> "Sequence[Sandbox]":
        """Return all sandboxes, oldest first."""
        return [Sandbox(self._runtime, metadata) for metadata in self.store.list_sandboxes()]

    def delete(self, container_id: str) -> bool:
        """Forget a container by its exact id; see `Container.delete`. Its record may be damaged."""
        key = require_text("container", container_id)
        return key in self.store and Container(self._runtime, key).delete()

    def prune(self, *, sandboxes: bool = False) -> Pruned:
        """Remove all containers that have ended; say what is gone.

        With `sandboxes` those without containers go, too, also if they are READY: ask for it only where nobody is about
        to use one.

        What waits for its restart stays. What cannot be removed stays, and is told with the reason.
        """
        ended = self.list(state=ContainerState.EXITED)
        return self._runtime.step(lambda: prune(self._runtime, ended, self.list_sandboxes() if sandboxes else ()))

    def history(self, container_id: str) -> "Sequence[Transition]":
        """Return the state changes of a container that are kept, oldest first: see `Store.history`."""
        return self.store.history(container_id)

    def back_up(self, target_path: str) -> None:
        """Copy the database to a new file while the engine is in use: see `Store.back_up`."""
        self.store.back_up(target_path)

    def exclusive(self, owner_id: str) -> AbstractContextManager[None]:
        """Keep other steps of the same container or sandbox out while the block runs."""
        return self._runtime.exclusive(require_text("container or sandbox", owner_id))

    def recover(self) -> Report:
        """Look at every container that has not ended, now, and return the report; may be called at any time."""
        return self._runtime.step(self._recover)

    def _recover(self) -> Report:
        orphans = judge_orphans(
            {self._containers_dir: lambda: self.store.ids, self._sandboxes_dir: lambda: self.store.sandbox_ids},
            self.store.node,
        )
        report = recover(
            self.store,
            probe=self._probe(),
            leftovers=list(find_owners(os.listdir(self._containers_dir), self.store.ids).values()),
            actors=self._actors,
            orphans=orphans,
            look_timeout=self._look_timeout,
        )
        self._end_leftovers()
        self.recovery = dispose(self.store.directory, report, self._runtime.exclusive_directory)
        self._set_sandboxes_right()
        self._follow_ups.begin()
        for finding in report.findings:
            if finding.observation.process is Process.PAUSED:
                self._runtime.note_container(finding.id)
        return self.recovery

    def _set_sandboxes_right(self) -> None:
        """See to what each sandbox holds, side by side: a plugin that hangs until its deadline holds up no other."""
        sandboxes = self.list_sandboxes()
        slow = [sandbox for sandbox in sandboxes if sandbox.may_hold]
        for sandbox in sandboxes:
            if not sandbox.may_hold:
                self._set_sandbox_right(sandbox)
        waiting: Queue[Sandbox | None] = Queue()
        failed = list[BaseException]()
        for each in (*slow, *[None] * _SIDE_BY_SIDE):
            waiting.put(each)

        def work() -> None:
            try:
                while (sandbox := waiting.get()) is not None:
                    self._set_sandbox_right(sandbox)
            except BaseException as error:  # noqa: BLE001  # it is raised below, by the thread that was asked
                failed.append(error)

        threads = [Thread(work, "limpet-sandboxes") for _ in slow[1:_SIDE_BY_SIDE]]
        begun = []
        with suppress(RuntimeError):  # no more threads: then fewer do it
            for thread in threads:
                thread.start()
                begun.append(thread)
        work()
        for thread in begun:
            thread.join()
        if failed:
            raise failed[0]
        self._runtime.starters.vacate_others(lambda: self.store.sandbox_ids)

    def _set_sandbox_right(self, sandbox: Sandbox) -> None:
        with self._runtime.exclusive(sandbox.id), suppress(NotFoundError):
            try:
                sandbox.set_right()
            except (InvalidInputError, UnsupportedError, ResourcesError, StateDirectoryError, DiskFullError) as error:
                _log.warning("sandbox %s: what it holds cannot be set right now: %s", sandbox.id, error)

    def declare_gone(self, container_id: str, why: str) -> Status:
        """Look at an Unknown container once more; if it stays Unknown, record on your word that it is gone.

        For what no look can settle, such as a process of a pid namespace that is over. Nothing is signalled. Return the
        status, which says what is true if the look has found that out. See `Store.declare_gone` for what is raised.
        """

        def settle() -> Status:
            key = self.get(container_id).id
            with self.exclusive(key):
                if self.store.status(key).unknown and not self.store.is_damaged(key):
                    self._reexamine(key)
                    status = self.store.status(key)
                    if status.state is ContainerState.EXITED:
                        return status
                settled = self.store.declare_gone(key, why)
                self._runtime.note_again(key)
                return settled

        return self._runtime.step(settle)

    def _reexamine(self, container_id: str) -> None:
        """Look at one container again, and write down what is true of it."""
        reexamine(self.store, container_id, probe=self._probe(), actors=self._actors, look_timeout=self._look_timeout)
        self._runtime.note_again(container_id)

    def _probe(self) -> Probe:
        return make_probe(self._runtime.starters, self._containers_dir)

    def _adopt(self, container_id: str, verdict: Verdict) -> None:
        identity = verdict.status.identity
        if identity is None or self._runtime.watcher.is_watched(container_id):
            return
        starter = self._runtime.starter_of(container_id)
        try:
            pidfd = starter.adopt(container_id, identity)
        except ResourcesError:
            pidfd = -1  # looked at again and again, then
        self._runtime.watcher.watch(container_id, identity, pidfd, starter)
        life = Life(self._runtime, container_id)
        with suppress(StateDirectoryError):  # then its bundle is damaged, which is told of it
            if is_changing_limits(life):
                self._runtime.note_container(container_id)
        if verdict.status.stop_requested_at:
            resume_stop(life, verdict.status, identity)
        elif is_in_stopped_sandbox(life):
            # It came in, or was found alive, after its sandbox was stopped.
            begin_stop(life, DEFAULT_STOP_TIMEOUT_SECONDS)

    def _remove_bundle(self, container_id: str, _: Verdict) -> None:
        with self._runtime.exclusive(container_id), suppress(NotFoundError):
            status = self.store.status(container_id)
            if status.released or not status.created_at:  # a step that was under way may have come in between
                self.get(container_id).remove_bundle()

    def _end_held(self, container_id: str, _: Verdict) -> None:
        with self._runtime.exclusive(container_id), suppress(NotFoundError):
            status = self.store.status(container_id)
            if status.finished_at or status.released or not status.started_at:
                self._runtime.starter_of(container_id).release(container_id)

    def _end_leftovers(self) -> None:
        """Have what is left of ended containers ended: a kill may have come between the end and this."""
        self._runtime.starters.end_leftovers(self._has_ended_here)

    def _has_ended_here(self, container_id: str) -> bool:
        try:
            return _has_ended_here(self.store.status(container_id))
        except NotFoundError:
            return False


def _has_ended_here(status: Status) -> bool:
    """Say whether the container ran in this boot and has ended, so that no process of it may be left."""
    if status.unknown or status.state is not ContainerState.EXITED or status.identity is None:
        return False
    here = (read_boot_id(), read_pid_namespace())
    return here == (status.identity.boot_id, status.identity.pid_namespace)
