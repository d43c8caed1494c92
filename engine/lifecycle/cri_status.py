"""A container's status in the words of the CRI (runtime/v1 ContainerStatus)."""

from limpet.engine.starters import to_cri_signal
from limpet.schema.cri import (
    ContainerResources,
    ContainerStateName,
    ContainerStatus,
    ContainerUser,
    ImageSpec,
    LinuxContainerSecurityContext,
    LinuxContainerUser,
)
from limpet.schema.metadata import Metadata
from limpet.schema.status import ContainerState, Status


def to_cri_status(metadata: Metadata, status: Status) -> ContainerStatus:
    """Return what a CRI runtime answers: `started_at` only once started, `finished_at` and the code once ended."""
    config = metadata.config
    state = status.state
    started = state is not ContainerState.CREATED
    ended = state is ContainerState.EXITED
    return ContainerStatus(
        id=metadata.id,
        metadata=config.metadata,
        state=ContainerStateName[state.name],
        created_at=status.created_at,
        started_at=status.started_at if started else 0,
        finished_at=status.finished_at if ended else 0,
        exit_code=status.exit_code if ended else 0,
        image=ImageSpec(image=str(metadata.image_manifest.name)),
        image_ref=metadata.image_manifest.digest or str(metadata.image_manifest.name),
        reason=status.reason,
        message=status.message,
        labels=config.labels,
        annotations=config.annotations,
        mounts=config.mounts,
        log_path=metadata.log_path,
        resources=ContainerResources(linux=status.resources.requested) if status.resources else None,
        image_id=metadata.image_manifest.digest or str(metadata.image_manifest.name),
        user=_find_user(metadata),
        stop_signal=to_cri_signal(metadata.stop_signal),
    )


def _find_user(metadata: Metadata) -> ContainerUser | None:
    """Return the user that config or image give by number; a group that neither gives is 0 in it."""
    config = metadata.config
    context = (config.linux and config.linux.security_context) or LinuxContainerSecurityContext()
    uid, _, gid = metadata.image_manifest.config.user.partition(":")
    if context.run_as_user is not None:
        uid, gid = str(context.run_as_user.value), ""
    elif context.run_as_username:
        uid, gid = context.run_as_username, ""
    if context.run_as_group is not None:
        gid = str(context.run_as_group.value)
    numbers = [
        int(each) if each.isascii() and each.isdigit() and len(each) <= 10 else None for each in (uid, gid or "0")
    ]
    if None in numbers:
        return None
    return ContainerUser(
        linux=LinuxContainerUser(
            uid=numbers[0] or 0, gid=numbers[1] or 0, supplemental_groups=context.supplemental_groups
        )
    )
