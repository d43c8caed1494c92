"""The engine: opened on a state directory, it knows what is true of every container, and runs new ones."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, Self

from limpet.engine.images import DirectoryImageStore, ImageStore
from limpet.engine.lifecycle.container import Container
from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.lifecycle.sandbox import Sandbox
from limpet.engine.reconcile import dispose, judge_orphans, recover, reexamine
from limpet.engine.starters import Starter, choose_log_path, choose_stop_signal, make_default_starter, make_probe
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
from limpet.schema.errors import NotFoundError, quote
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

    def __init__(self, store: Store, images: ImageStore, starter: Starter, look_timeout: float) -> None:
        self.store = store
        self._containers_dir = store.directory.join(CONTAINERS)
        self._sandboxes_dir = store.directory.join(SANDBOXES)
        self._look_timeout = look_timeout
        self._actors = {Action.ADOPT: self._adopt, Action.REMOVE_BUNDLE: self._remove_bundle}
        self._runtime = Runtime(
            store=store,
            images=images,
            starter=starter,
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
        look_timeout: float = LOOK_TIMEOUT_SECONDS,
    ) -> Self:
        """Lock the state directory, migrate, recover, and return an engine whose `recovery` says what it found.

        In a recovery pass each look at a container may take `look_timeout` seconds; one that takes longer makes that
        container Unknown.

        Raises StateDirectoryLockedError if another engine has it open, and the other errors of `Store.open`.
        """
        store = Store.open(resolve_directory(state_dir), node=node)
        try:
            for name in (CONTAINERS, SANDBOXES):
                make_directory(store.directory.join(name))
            if images is None:
                images = DirectoryImageStore(store.directory.join(IMAGES))
                images.register_builtin(HOST_IMAGE)
            engine = cls(store, images, starter or make_default_starter(), look_timeout)
        except BaseException:
            store.close()
            raise
        try:
            engine.recover()
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
        """Stop watching and close the store; the containers run on. Repeating it is fine: it finishes the first."""
        if self.store.is_foreign:
            return
        self._runtime.watcher.close()
        self.store.close()

    def create_sandbox(
        self, config: PodSandboxConfig | bytes | str | Mapping[str, Any], *, id: str | None = None
    ) -> Sandbox:
        """Make a sandbox from a CRI PodSandboxConfig, which may be given as JSON. Raises InvalidInputError."""
        config = parse_pod_sandbox_config(config)
        key = new_id() if id is None else id
        metadata = SandboxMetadata(
            id=key,
            name=config.metadata.name,
            config=config,
            created_at=max(time.time_ns(), 1),
            root_dir=self._runtime.sandbox_path(key),
        )
        choose_log_path(config.log_directory or "/", "check")
        sandbox = Sandbox(self._runtime, metadata)
        with self._runtime.exclusive(key):
            self.store.add_sandbox(metadata)
            sandbox.bundle.make()
        return sandbox

    def create_container(
        self,
        config: ContainerConfig | bytes | str | Mapping[str, Any],
        sandbox_id: str,
        *,
        id: str | None = None,
        mount_type: MountType = MountType.PLAIN,
    ) -> Container:
        """Make a container from a CRI ContainerConfig, which may be given as JSON, in a sandbox. It is then CREATED.

        Raises InvalidInputError, NotFoundError for the sandbox or the image, AlreadyExistsError for id or name.
        """
        container = self.add_container(config, sandbox_id, id=id)
        try:
            container.create(mount_type)
        except BaseException:
            self.store.delete(container.id)
            raise
        return container

    def add_container(
        self,
        config: ContainerConfig | bytes | str | Mapping[str, Any],
        sandbox_id: str,
        *,
        id: str | None = None,
    ) -> Container:
        """Write down a container that is not created yet; `Container.create` makes its bundle."""
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
            starter=self._runtime.starter.name,
        )
        self.store.add(metadata)
        return Container(self._runtime, key)

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
        orphans = judge_orphans(
            {self._containers_dir: lambda: self.store, self._sandboxes_dir: lambda: self.store.sandbox_ids}
        )
        report = recover(
            self.store,
            probe=self._probe(),
            leftovers=os.listdir(self._containers_dir),
            actors=self._actors,
            orphans=orphans,
            look_timeout=self._look_timeout,
        )
        self._end_leftovers()
        self.recovery = dispose(self.store.directory, report, self.exclusive)
        for sandbox in self.list_sandboxes():
            with self._runtime.exclusive(sandbox.id):
                if sandbox.bundle.is_missing():
                    sandbox.bundle.make()  # a kill came between its row and its marked directory
        return self.recovery

    def _reexamine(self, container_id: str) -> None:
        """Look at one container again, and write down what is true of it."""
        reexamine(self.store, container_id, probe=self._probe(), actors=self._actors, look_timeout=self._look_timeout)

    def _probe(self) -> Probe:
        return make_probe(self._runtime.starter, self._containers_dir)

    def _adopt(self, container_id: str, verdict: Verdict) -> None:
        identity = verdict.status.identity
        if identity is None or self._runtime.watcher.pidfd(container_id) is not None:
            return
        pidfd = self._runtime.starter.adopt(identity, self._runtime.bundle_path(container_id))
        self._runtime.watcher.watch(container_id, identity.pid, pidfd)

    def _remove_bundle(self, container_id: str, _: Verdict) -> None:
        with self._runtime.exclusive(container_id), suppress(NotFoundError):
            status = self.store.status(container_id)
            if status.released or not status.created_at:  # a step that was under way may have come in between
                self.get(container_id).remove_bundle()

    def _end_leftovers(self) -> None:
        """Have what is left of ended containers ended: a kill may have come between the end and this."""
        self._runtime.starter.end_leftovers(self._containers_dir, self._has_ended_here)

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
