"""How a container begins: its bundle is made, its process is prepared and held, written down, and let go."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace as replace_field

from msgspec.structs import replace

from limpet.engine.lifecycle.life import Life
from limpet.engine.starters import Launch, Prepared, Starter
from limpet.engine.state.clock import now
from limpet.schema.cri import NamespaceMode
from limpet.schema.errors import LimpetError, NotFoundError, StartError, StoreDamagedError, UnsupportedError, quote
from limpet.schema.identity import ProcessIdentity
from limpet.schema.image import MountType
from limpet.schema.metadata import Metadata
from limpet.schema.restart import RestartKind
from limpet.schema.sandbox_status import SandboxState
from limpet.schema.status import ContainerState, Status, end_never_run


def create(life: Life, mount_type: MountType) -> Status:
    """Make the bundle, and write down that it is made. Raises as `Container.create` does."""
    with life.exclusive():
        status = life.status
        if status.created_at or status.finished_at or status.released:
            raise life.refuse("create", "only one that was never created can be")
        try:
            image = life.metadata.image_manifest
            if image.is_builtin and mount_type != MountType.PLAIN:
                raise UnsupportedError(f"mount type {quote(mount_type)}: a built-in image has nothing to mount")
            life.bundle.begin(has_root=not image.is_builtin)
            if not image.is_builtin:
                life.bundle.flush_marker()
                life.runtime.images.mount(image.exact_name, mount_type, life.bundle.rootfs)
            launch = _launch(life)
            unapplied = life.starter.find_unapplied(launch)
            life.bundle.finish(life.starter.make_config(launch), has_content=not image.is_builtin)
        except BaseException:
            with suppress(LimpetError):  # what stays has a record: a repetition, a deletion or a recovery removes it
                life.bundle.remove()
            raise
        return life.update(
            lambda old: replace(old, created_at=now(), reason="", message="", unapplied=unapplied, unknown=False)
        )


def start(life: Life, secrets: Mapping[str, str]) -> Status:
    """Start the program. Raises as `Container.start` does."""
    with life.exclusive():
        status = life.status
        if status.state is not ContainerState.CREATED or status.released:
            raise life.refuse("start", "only a CREATED one that was not released can be")
        if status.stop_requested_at:
            raise life.refuse("start", "it was stopped before it was started; create another")
        if is_in_stopped_sandbox(life):
            raise life.refuse("start", f"its sandbox {life.metadata.sandbox_id} is NOTREADY; make another")
        starter = life.starter
        try:
            return _prepare_and_go(life, starter, secrets)
        except StartError as error:
            message = str(error)
            life.update(lambda old: end_never_run(old, message, finished_at=now()))
            with suppress(LimpetError):  # the keeper keeps it for longer, then
                starter.forget_exits([life.id])
            _note_restart(life)
            raise StartError(f"container {life.id}: {message}") from error


def fail_start(life: Life, why: str) -> None:
    """Write down that it ended without having been started, and why."""
    with life.exclusive():
        if not life.status.started_at:
            life.update(lambda old: end_never_run(old, why, finished_at=now()))


def is_in_stopped_sandbox(life: Life) -> bool:
    """Say whether its sandbox is NOTREADY; not if that, or which one it is, cannot be read."""
    try:
        return life.runtime.store.sandbox_status(life.metadata.sandbox_id).state is SandboxState.NOTREADY
    except (NotFoundError, StoreDamagedError):
        return False


def _prepare_and_go(life: Life, starter: Starter, secrets: Mapping[str, str]) -> Status:
    launch = _launch(life)
    if life.metadata.root_dir != life.bundle.path:
        # It names paths of where the state directory was then.
        life.bundle.finish(starter.make_config(launch), has_content=not life.metadata.image_manifest.is_builtin)
    prepared = starter.prepare(replace_field(launch, secret_env=secrets))
    try:
        # Written before it may run: a kill until here closes the gate, and nothing has run.
        life.runtime.store.update(
            life.id,
            lambda old: replace(
                old,
                pid=prepared.identity.pid,
                identity=prepared.identity,
                started_at=now(),
                resources=prepared.resources,
                reason="",
                message="",
            ),
            ready_sandbox=launch.metadata.sandbox_id,  # which may have been stopped just now
        )
    except BaseException:
        starter.abort(prepared)
        raise
    _note_restart(life)
    try:
        starter.go(prepared)
    except StartError:
        raise
    except BaseException:  # what became of it is not known: its end will be seen, and how it was is asked then
        _watch(life, prepared, starter)
        raise
    _watch(life, prepared, starter)
    return life.status


def _watch(life: Life, prepared: Prepared, starter: Starter) -> None:
    watcher = life.runtime.watcher
    watcher.watch(life.id, prepared.identity, prepared.pidfd, starter, monitor=prepared.monitor)


def _note_restart(life: Life) -> None:
    """Have its policy asked when it has ended, or now if it has."""
    if life.metadata.restart_policy != RestartKind.NO:
        life.runtime.note_container(life.id)


def _launch(life: Life) -> Launch:
    store, metadata = life.runtime.store, life.runtime.bring_home(life.metadata)
    try:
        sandbox = store.get_sandbox(metadata.sandbox_id)
        namespaces = store.sandbox_status(sandbox.id).namespaces
    except (NotFoundError, StoreDamagedError):
        sandbox, namespaces = None, {}
    return Launch(
        id=life.id,
        bundle_path=life.bundle.path,
        metadata=metadata,
        sandbox=sandbox,
        log_directory=life.runtime.log_directory(sandbox) if sandbox else "",
        namespaces=namespaces,
        target=_find_target(life, metadata),
    )


def _find_target(life: Life, metadata: Metadata) -> ProcessIdentity | None:
    """Return the first process of the container whose pid namespace it asks to see, if it runs in its sandbox."""
    linux = metadata.config.linux
    options = linux.security_context.namespace_options if linux and linux.security_context else None
    if options is None or options.pid is not NamespaceMode.TARGET:
        return None
    with suppress(NotFoundError, StoreDamagedError):
        target = life.runtime.store.get(options.target_id)
        is_here = target.id == options.target_id and target.metadata.sandbox_id == metadata.sandbox_id
        if is_here and target.status.state is ContainerState.RUNNING and target.id != life.id:
            return target.status.identity
    return None
