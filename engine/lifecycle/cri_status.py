"""The status of containers and sandboxes in the words of the CRI (runtime/v1 ContainerStatus, PodSandboxStatus)."""

import os

import msgspec

from limpet.recovery.files import read_small_file
from limpet.schema.cri import (
    ContainerResources,
    ContainerStateName,
    ContainerStatus,
    ContainerUser,
    ImageSpec,
    LinuxContainerSecurityContext,
    LinuxContainerUser,
    LinuxPodSandboxStatus,
    Namespace,
    NamespaceOption,
    PodIP,
    PodSandboxNetworkStatus,
    PodSandboxStateName,
    PodSandboxStatus,
)
from limpet.schema.decoders import make_decoder
from limpet.schema.layout import CONFIG_FILE
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.runtime_spec import User
from limpet.schema.sandbox_status import SandboxStatus
from limpet.schema.signals import to_cri_signal
from limpet.schema.status import ContainerState, Reason, Status

_CONFIG_BYTES = 64 << 20


class _Process(msgspec.Struct):
    user: User = User()


class _RuntimeConfig(msgspec.Struct):
    """What is read here of a bundle's config.json, whichever starter made it."""

    process: _Process = msgspec.field(default_factory=_Process)


_runtime_config = make_decoder(_RuntimeConfig)


def read_user(bundle_path: str) -> User:
    """Return the user that a bundle's config.json has; one without a number if it has none, or cannot be read."""
    try:
        data = read_small_file(os.path.join(bundle_path, CONFIG_FILE), _CONFIG_BYTES)
        return _runtime_config.decode(data).process.user
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return User()


def to_cri_status(
    metadata: Metadata,
    status: Status,
    user: User = User(),  # noqa: B008  # frozen
    *,
    added_at: int = 0,
) -> ContainerStatus:
    """Return what a CRI runtime answers: `started_at` only once started, `finished_at` and the code once ended.

    `user` is who the program was found to run as; without a number it is told as config and image give it by number.
    `added_at` is when its record was written, in nanoseconds: it stands for the time of a create that was cut short.
    """
    config = metadata.config
    state = status.state
    started = state is not ContainerState.CREATED
    ended = state is ContainerState.EXITED
    return ContainerStatus(
        id=metadata.id,
        metadata=config.metadata,
        state=ContainerStateName[state.name],
        created_at=status.created_at or added_at or status.finished_at or 1,  # a kubelet refuses 0
        started_at=status.started_at if started else 0,
        finished_at=status.finished_at if ended else 0,
        exit_code=status.exit_code if ended else 0,
        image=ImageSpec(image=str(metadata.image_manifest.name)),
        image_ref=metadata.image_manifest.digest or str(metadata.image_manifest.name),
        reason=status.reason or (_find_reason(status) if ended else ""),
        message=status.message,
        labels=config.labels,
        annotations=config.annotations,
        mounts=() if "mounts" in status.unapplied else config.mounts,
        log_path=metadata.log_path,
        resources=ContainerResources(linux=status.resources.requested) if status.resources else None,
        image_id=metadata.image_manifest.digest or str(metadata.image_manifest.name),
        user=_find_user(metadata) if user.uid is None else _to_cri_user(user),
        stop_signal=to_cri_signal(metadata.stop_signal),
    )


def to_cri_sandbox_status(metadata: SandboxMetadata, status: SandboxStatus) -> PodSandboxStatus:
    """Return what a CRI runtime answers of a sandbox. Namespaces are told as its config asks for them."""
    config = metadata.config
    context = config.linux and config.linux.security_context
    first, *others = status.addresses or ("",)
    return PodSandboxStatus(
        id=metadata.id,
        metadata=config.metadata,
        state=PodSandboxStateName[status.state.name],
        created_at=metadata.created_at,
        network=PodSandboxNetworkStatus(ip=first, additional_ips=tuple(PodIP(ip=each) for each in others)),
        linux=LinuxPodSandboxStatus(
            namespaces=Namespace(options=(context and context.namespace_options) or NamespaceOption())
        ),
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=metadata.runtime_handler,
    )


def _find_reason(status: Status) -> Reason:
    """Return why it ended, where its runtime has not said so."""
    return Reason.ERROR if status.exit_code else Reason.COMPLETED


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
    return _to_cri_user(User(uid=numbers[0], gid=numbers[1], additional_gids=context.supplemental_groups))


def _to_cri_user(user: User) -> ContainerUser:
    return ContainerUser(
        linux=LinuxContainerUser(uid=user.uid or 0, gid=user.gid or 0, supplemental_groups=user.additional_gids)
    )
