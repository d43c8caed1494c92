"""The engine: opened on a state directory, it knows what is true of every container, and runs new ones."""

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, Self

from msgspec.structs import replace

from limpet.engine.images import DirectoryImageStore, ImageStore
from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.lifecycle.sandbox import Sandbox
from limpet.engine.lifecycle.steps import run_whole
from limpet.engine.reconcile import dispose, judge_orphans, recover, reexamine
from limpet.engine.starters import (
    Launch,
    Starter,
    Starters,
    choose_log_path,
    choose_stop_signal,
    make_probe,
)
from limpet.engine.starters.abilities import Pauser
from limpet.engine.state.descriptors import raise_descriptor_limit, system_errors_told
from limpet.engine.state.durable import make_directory
from limpet.engine.state.entries import resolve_directory
from limpet.engine.state.names import CONTAINERS, IMAGES, SANDBOXES
from limpet.engine.store import Store
from limpet.recovery.host import read_boot_id, read_pid_namespace
from limpet.recovery.looks import LOOK_TIMEOUT_SECONDS
from limpet.recovery.probe import Probe
from limpet.recovery.report import Report
from limpet.recovery.rules import Action, Verdict
from limpet.schema.cri import ContainerConfig, PodSandboxConfig, parse_container_config, parse_pod_sandbox_config
from limpet.schema.errors import InvalidInputError, NotFoundError, ResourcesError, quote, quote_path
from limpet.schema.file_name import find_owners
from limpet.schema.image import ImageName, MountType
from limpet.schema.metadata import DEFAULT_NODE, Metadata, SandboxMetadata, new_id
from limpet.schema.status import ContainerState, Status

HOST_IMAGE = ImageName("host")
"""The built-in image: no layers, the host's own programs."""


class Engine:
    """Containers whose state survives a crash. Open it with `Engine.open`; thread-safe.

    Closing the engine leaves its containers running; the next one that is opened finds them again.
    """

    recovery: Report
    """What the last recovery pass found."""

    def __init__(self, store: Store, images: ImageStore, starters: Starters, look_timeout: float) -> None:
        self.store = store
        self._containers_dir = store.directory.join(CONTAINERS)
        self._sandboxes_dir = store.directory.join(SANDBOXES)
        self._look_timeout = look_timeout
        self._closing = threading.Lock()
        self._is_closed = False
        self._pid = os.getpid()
        self._actors = {Action.ADOPT: self._adopt, Action.REMOVE_BUNDLE: self._remove_bundle}
        self._runtime = Runtime(
            store=store,
            images=images,
            starters=starters,
            containers_dir=self._containers_dir,
            sandboxes_dir=self._sandboxes_dir,
            reexamine=self._reexamine,
        )

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
    ) -> Self:
        """Lock the state directory, migrate, recover, and return an engine whose `recovery` says what it found.

        `runtimes` are the starters of sandboxes that name a runtime handler, by that name; `starter` runs the
        containers of all others, as processes of this host if it is not given.

        In a recovery pass each look at a container may take `look_timeout` seconds; one that takes longer makes that
        container Unknown.

        This process's soft limit of file descriptors is raised to the hard one; containers get the original limits.
        Containers of the `host` image get PATH, HOME and the like of this process's environment, and those variables
        that `inherit_env` names; containers of other images nothing of it.

        Raises StateDirectoryLockedError if another engine has it open, ResourcesError if no file descriptors are left,
        InvalidInputError for names in `inherit_env` that are none or beside a starter of your own, and for two starters
        of one name, and the other errors of `Store.open`.
        """
        if starter is not None and inherit_env:
            raise InvalidInputError("inherit_env: give it to the starter that you open the engine with")
        chosen = Starters(starter, runtimes, inherit_env)
        raise_descriptor_limit()
        opened: list[Self] = []
        try:
            with system_errors_told(f"state directory {quote_path(state_dir)}"):
                run_whole(lambda: opened.append(cls._open(state_dir, node, images, chosen, look_timeout)))
        except BaseException:
            for engine in opened:  # an interrupt came while it was opened
                engine.close()
            raise
        return opened[0]

    @classmethod
    def _open(
        cls,
        state_dir: str | os.PathLike[str],
        node: str,
        images: ImageStore | None,
        starters: Starters,
        look_timeout: float,
    ) -> Self:
        store = Store.open(resolve_directory(state_dir), node=node)
        try:
            for name in (CONTAINERS, SANDBOXES):
                make_directory(store.directory.join(name))
            if images is None:
                images = DirectoryImageStore(store.directory.join(IMAGES))
                images.register_builtin(HOST_IMAGE)
            starters.open(store.directory.path)
            engine = cls(store, images, starters, look_timeout)
        except BaseException:
            store.close()
            starters.close()
            raise
        try:
            engine._recover()  # a class method of its own class
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

    def close(self) -> None:
        """Stop watching and close the store; the containers run on. Who waits gets ClosedError. May be repeated."""
        if os.getpid() == self._pid:
            self._runtime.step(self._close)

    def _close(self) -> None:
        with self._closing:  # a second caller waits until the first is done
            if not self._is_closed:
                self._runtime.close()
                self.store.close()
                self._runtime.ring_all()
                self._is_closed = True

    def create_sandbox(
        self,
        config: PodSandboxConfig | bytes | str | Mapping[str, Any],
        *,
        id: str | None = None,
        runtime_handler: str = "",
    ) -> Sandbox:
        """Make a sandbox from a CRI PodSandboxConfig, which may be given as JSON.

        `runtime_handler` names the starter of its containers, one of `runtimes` of `open`. Raises InvalidInputError.
        """
        return self._runtime.step(lambda: self._create_sandbox(parse_pod_sandbox_config(config), id, runtime_handler))

    def _create_sandbox(self, config: PodSandboxConfig, id: str | None, runtime_handler: str) -> Sandbox:
        self._runtime.starters.choose(runtime_handler)
        key = new_id() if id is None else id
        metadata = SandboxMetadata(
            id=key,
            name=config.metadata.name,
            config=config,
            created_at=max(time.time_ns(), 1),
            root_dir=self._runtime.sandbox_path(key),
            runtime_handler=runtime_handler,
        )
        choose_log_path(config.log_directory or "/", "check")
        with self._runtime.exclusive(key):
            self.store.add_sandbox(metadata)  # which refuses an id that can be none
            sandbox = Sandbox(self._runtime, metadata)
            sandbox.bundle.make()
        return sandbox

    def create_container(
        self,
        config: ContainerConfig | bytes | str | Mapping[str, Any],
        sandbox_id: str,
        *,
        id: str | None = None,
        mount_type: MountType = MountType.PLAIN,
        strict: bool = False,
    ) -> Container:
        """Make a container from a CRI ContainerConfig, which may be given as JSON, in a sandbox. It is then CREATED.

        What the config asks for and the starter does not do is in the status, `unapplied`; with `strict` it is refused.
        Raises InvalidInputError, NotFoundError for the sandbox or the image, AlreadyExistsError for id or name.
        """

        def create() -> Container:
            container = self.add_container(config, sandbox_id, id=id, strict=strict)
            try:
                container.create(mount_type)
            except BaseException:
                self.store.delete(container.id)
                raise
            return container

        return self._runtime.step(create)

    def add_container(
        self,
        config: ContainerConfig | bytes | str | Mapping[str, Any],
        sandbox_id: str,
        *,
        id: str | None = None,
        strict: bool = False,
    ) -> Container:
        """Write down a container that is not created yet; `Container.create` makes its bundle.

        With `strict`, InvalidInputError names each field that asks for what the starter does not do.
        """
        config = parse_container_config(config)
        sandbox = self.get_sandbox(sandbox_id)
        manifest = self.images.manifest(ImageName.parse(config.image.image))
        key = new_id() if id is None else id
        metadata = Metadata(
            id=key,
            name=config.metadata.name,
            sandbox_id=sandbox.id,
            config=config,
            image_manifest=manifest,
            log_path=choose_log_path(sandbox.log_directory, config.log_path),
            stop_signal=choose_stop_signal(config, manifest.config),
            root_dir=self._runtime.bundle_path(key),
            starter=self._runtime.starters.choose(sandbox.metadata.runtime_handler).name,
        )
        if strict:
            self._refuse_unapplied(metadata, sandbox.metadata)
        self.store.add(metadata)
        return Container(self._runtime, key)

    def _refuse_unapplied(self, metadata: Metadata, sandbox: SandboxMetadata) -> None:
        launch = Launch(id=metadata.id, bundle_path=metadata.root_dir, metadata=metadata, sandbox=sandbox)
        found = self._runtime.starters.of(metadata).find_unapplied(launch)
        if found:
            reasons = "; ".join(f"{name} ({why})" for name, why in found.items())
            raise InvalidInputError(f"container {metadata.name!r}: not done by this starter: {reasons}")

    def get(self, container_id: str) -> Container:
        """Return the container with this id, or the one whose id begins with it. Raises NotFoundError."""
        return Container(self._runtime, self.store.get(container_id).id)

    def list(
        self,
        *,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        state: ContainerState | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> "Sequence[Container]":
        """Return the containers that match all that is given; see `Store.list`."""
        records = self.store.list(id=id, name=name, sandbox_id=sandbox_id, state=state, labels=labels)
        return [Container(self._runtime, record.id) for record in records]

    def get_sandbox(self, sandbox_id: str) -> Sandbox:
        """Return the sandbox with this id, or the one whose id begins with it. Raises NotFoundError."""
        return Sandbox(self._runtime, self.store.get_sandbox(sandbox_id))

    def list_sandboxes(self) -> "Sequence[Sandbox]":
        """Return all sandboxes, oldest first."""
        return [Sandbox(self._runtime, metadata) for metadata in self.store.list_sandboxes()]

    def delete(self, container_id: str) -> None:
        """Forget a container by its exact id; see `Container.delete`. Its record may be damaged."""
        container = self.get(container_id)
        if container.id != container_id:
            raise NotFoundError(f"container {quote(container_id)}: give the whole id to delete it")
        container.delete()

    def exclusive(self, owner_id: str) -> AbstractContextManager[None]:
        """Keep other steps of the same container or sandbox out while the block runs."""
        return self._runtime.exclusive(owner_id)

    def recover(self) -> Report:
        """Look at every container that has not ended, now, and return the report; may be called at any time."""
        with system_errors_told(f"recovery in {quote_path(self.store.directory.path)}"):
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
        for sandbox in self.list_sandboxes():
            with self._runtime.exclusive(sandbox.id):
                if sandbox.bundle.is_missing():
                    sandbox.bundle.make()  # a kill came between its row and its marked directory
        return self.recovery

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
                return self.store.declare_gone(key, why)

        return self._runtime.step(settle)

    def _reexamine(self, container_id: str) -> None:
        """Look at one container again, and write down what is true of it."""
        reexamine(self.store, container_id, probe=self._probe(), actors=self._actors, look_timeout=self._look_timeout)

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
        if isinstance(starter, Pauser) and starter.is_paused(container_id, identity) != verdict.status.paused:
            # A kill came between the pause and its record, or somebody else did it.
            self.store.update(container_id, lambda old: replace(old, paused=not old.paused and not old.finished_at))
        if verdict.status.stop_requested_at:
            Container(self._runtime, container_id).resume_stop(verdict.status, identity)

    def _remove_bundle(self, container_id: str, _: Verdict) -> None:
        with self._runtime.exclusive(container_id), suppress(NotFoundError):
            status = self.store.status(container_id)
            if status.released or not status.created_at:  # a step that was under way may have come in between
                self.get(container_id).remove_bundle()

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
