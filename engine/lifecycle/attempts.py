"""The attempts of one name: which comes after which, and the next one, which is added once.

A restart is one transaction that adds the next attempt, whose name and number can be there once only. So a kill before
it leaves an attempt that waits, a kill after it one that is to be started, and each is taken up by the next engine.
"""

from msgspec.structs import replace

from limpet.engine.lifecycle.runtime import Runtime
from limpet.engine.starters import choose_stop_signal
from limpet.engine.store import Draft, Store
from limpet.recovery.intents import Place, Step, decide_step, make_intent, restart_due_at
from limpet.schema.cri import LinuxContainerConfig
from limpet.schema.errors import InvalidInputError, NotFoundError, StoreDamagedError
from limpet.schema.image import ImageName
from limpet.schema.metadata import Metadata, new_id
from limpet.schema.restart import RestartKind, next_delay
from limpet.schema.status import Status


def find_attempt(store: Store, metadata: Metadata, steps: int) -> str | None:
    """Return the id of the attempt that is so many after this one, or before it; None if there is none."""
    return store.find_attempt(metadata.sandbox_id, metadata.name, metadata.config.metadata.attempt + steps)


def find_follower(store: Store, metadata: Metadata) -> str | None:
    """Return the id of the attempt that the policy of this one has made after it; None if there is none."""
    if metadata.restart_policy == RestartKind.NO:
        return None
    found = find_attempt(store, metadata, 1)
    return found if found is not None and _is_made_by_policy(store, found, metadata, 1) else None


def find_earlier(store: Store, metadata: Metadata) -> list[str]:
    """Return the ids of the attempts whose policy has led to this one, the latest first."""
    found: list[str] = []
    while len(found) < metadata.restart_count:
        key = find_attempt(store, metadata, -1 - len(found))
        if key is None or not _is_made_by_policy(store, key, metadata, -1 - len(found)):
            break
        found.append(key)
    return found


def find_place(store: Store, metadata: Metadata) -> Place:
    """Return which of the attempts of its name this one is."""
    following = [find_attempt(store, metadata, steps) for steps in (1, 2)]
    if following[0] is None:
        return Place.LAST
    are_made_by_policy = [
        found is not None and _is_made_by_policy(store, found, metadata, steps)
        for steps, found in enumerate(following, start=1)
    ]
    return Place.OUTDATED if all(are_made_by_policy) else Place.FOLLOWED


def find_restart(store: Store, metadata: Metadata, status: Status) -> int:
    """Return when the next attempt is due, in nanoseconds since the epoch; 0 if none is to come.

    Raises StoreDamagedError for a sandbox whose record cannot be read.
    """
    due = restart_due_at(metadata, status)
    if not due or find_attempt(store, metadata, 1) is not None:
        return 0
    return 0 if store.sandbox_status(metadata.sandbox_id).stopped_at else due


def add_next(runtime: Runtime, metadata: Metadata) -> str | None:
    """Add the attempt after this one, unless that is not to be any more; return its id, None if nothing was added.

    Labels, extra, expiry and limits are carried along. Raises InvalidStateError in a copy of a state directory, if its
    log is outside; NotFoundError, StoreError.
    """
    home = _with_image_of_now(runtime, runtime.bring_home(metadata))
    with runtime.store.transaction() as draft:
        status = draft.status(metadata.id)
        is_last = _find_in_draft(draft, metadata, 1) is None
        is_ready = not draft.sandbox_status(metadata.sandbox_id).stopped_at
        place = Place.LAST if is_last else Place.FOLLOWED
        if decide_step(make_intent(metadata, status, place=place, is_ready=is_ready)).step is not Step.RESTART:
            return None
        key, config = new_id(), metadata.config
        following = replace(
            home,
            id=key,
            config=replace(
                config,
                metadata=replace(config.metadata, attempt=config.metadata.attempt + 1),
                linux=_carry_limits(config.linux, status),
            ),
            root_dir=runtime.bundle_path(key),
            restart_count=metadata.restart_count + 1,
            restart_delay=next_delay(metadata, status),
        )
        draft.add(following, Status(extra=status.extra, expires_at=status.expires_at))
        draft.carry_expiry(metadata.id, key)
    return key


def _with_image_of_now(runtime: Runtime, metadata: Metadata) -> Metadata:
    """Return the metadata with the image that its config names now: another may have been loaded since."""
    try:
        image = runtime.images.manifest(ImageName.parse(metadata.config.image.image))
        stop_signal = choose_stop_signal(metadata.config, image.config)
    except (InvalidInputError, NotFoundError, StoreDamagedError):  # as will be told when the attempt is made
        return metadata
    return replace(metadata, image_manifest=image, stop_signal=stop_signal)


def _carry_limits(linux: LinuxContainerConfig | None, status: Status) -> LinuxContainerConfig | None:
    """Return that part of a config with the limits that the container had at last: they may have been changed."""
    if status.resources is None:
        return linux
    return replace(linux or LinuxContainerConfig(), resources=status.resources.requested)


def cancel_next(store: Store, metadata: Metadata) -> None:
    """Write down that one which waits, for its restart or for its start by the policy, is to stay as it is."""
    with store.transaction() as draft:
        status = draft.status(metadata.id)
        if not status.unknown:
            draft.cancel_restart(metadata, status)


def delete_attempt(store: Store, metadata: Metadata) -> bool:
    """Delete a container, False if it is gone already; the attempt before it is not restarted in its place."""
    with store.transaction() as draft:
        was_there = draft.delete(metadata.id)
        before = _find_in_draft(draft, metadata, -1) if metadata.restart_count else None
        if before is not None:
            status = draft.status(before)
            if status.finished_at and not status.unknown and not status.stop_requested_at:
                draft.mark_stopped(before, status)
    return was_there


def _find_in_draft(draft: Draft, metadata: Metadata, steps: int) -> str | None:
    return draft.find_attempt(metadata.sandbox_id, metadata.name, metadata.config.metadata.attempt + steps)


def _is_made_by_policy(store: Store, container_id: str, of: Metadata, steps: int) -> bool:
    try:
        return store.metadata(container_id).restart_count == of.restart_count + steps
    except (NotFoundError, StoreDamagedError):
        return False
