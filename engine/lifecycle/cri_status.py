"""A container's status in the words of the CRI (runtime/v1 ContainerStatus)."""

from limpet.schema.cri import ContainerResources, ContainerStateName, ContainerStatus, ImageSpec
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
    )
