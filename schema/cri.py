"""The CRI's messages (k8s.io/cri-api, runtime/v1/api.proto) that configure and describe containers and sandboxes.

One flat list of declarations, to compare with the proto file: it has the same names, types and defaults. Fields that
limpet does not act on are kept, so that writing a message loses nothing. Three fields have a different Python name:
uid_mappings, gid_mappings and cdi_devices. A message's constructor does not check it; `parse_container_config` and
`parse_pod_sandbox_config` check it as they check JSON. `protobuf_json.to_json` writes messages.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from limpet.schema.protobuf_json import read_message

Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
UInt32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
UInt64 = Annotated[int, msgspec.Meta(ge=0)]  # msgspec has no bounds above int64; the reader checks the upper one


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The base of all messages: immutable, keyword-only, written without defaults."""


# Enums: members are in the order of their numbers, from 0 without gaps; their values are the JSON names.


class Protocol(StrEnum):
    """The protocol of a port mapping."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class MountPropagation(StrEnum):
    """The propagation of a mount: rprivate, rslave, rshared in Linux's terms."""

    PRIVATE = "PROPAGATION_PRIVATE"
    HOST_TO_CONTAINER = "PROPAGATION_HOST_TO_CONTAINER"
    BIDIRECTIONAL = "PROPAGATION_BIDIRECTIONAL"


class NamespaceMode(StrEnum):
    """Whose namespace a container uses: the pod's, its own, the host's, or another container's."""

    POD = "POD"
    CONTAINER = "CONTAINER"
    NODE = "NODE"
    TARGET = "TARGET"


class SupplementalGroupsPolicy(StrEnum):
    """Whether the groups in the image's /etc/group apply too."""

    MERGE = "Merge"
    STRICT = "Strict"


class ProfileType(StrEnum):
    """Which seccomp or AppArmor profile applies."""

    RUNTIME_DEFAULT = "RuntimeDefault"
    UNCONFINED = "Unconfined"
    LOCALHOST = "Localhost"


class ContainerStateName(StrEnum):
    """A container's state as the CRI's JSON names it; members are named as in limpet.schema.status.ContainerState."""

    CREATED = "CONTAINER_CREATED"
    RUNNING = "CONTAINER_RUNNING"
    EXITED = "CONTAINER_EXITED"
    UNKNOWN = "CONTAINER_UNKNOWN"


class PodSandboxStateName(StrEnum):
    """A sandbox's state as the CRI's JSON names it; members are named as in limpet.schema.sandbox_status."""

    READY = "SANDBOX_READY"
    NOTREADY = "SANDBOX_NOTREADY"


class Signal(StrEnum):
    """A stop signal; the numbers are the CRI's, not the kernel's."""

    RUNTIME_DEFAULT = "RUNTIME_DEFAULT"
    SIGABRT = "SIGABRT"
    SIGALRM = "SIGALRM"
    SIGBUS = "SIGBUS"
    SIGCHLD = "SIGCHLD"
    SIGCLD = "SIGCLD"
    SIGCONT = "SIGCONT"
    SIGFPE = "SIGFPE"
    SIGHUP = "SIGHUP"
    SIGILL = "SIGILL"
    SIGINT = "SIGINT"
    SIGIO = "SIGIO"
    SIGIOT = "SIGIOT"
    SIGKILL = "SIGKILL"
    SIGPIPE = "SIGPIPE"
    SIGPOLL = "SIGPOLL"
    SIGPROF = "SIGPROF"
    SIGPWR = "SIGPWR"
    SIGQUIT = "SIGQUIT"
    SIGSEGV = "SIGSEGV"
    SIGSTKFLT = "SIGSTKFLT"
    SIGSTOP = "SIGSTOP"
    SIGSYS = "SIGSYS"
    SIGTERM = "SIGTERM"
    SIGTRAP = "SIGTRAP"
    SIGTSTP = "SIGTSTP"
    SIGTTIN = "SIGTTIN"
    SIGTTOU = "SIGTTOU"
    SIGURG = "SIGURG"
    SIGUSR1 = "SIGUSR1"
    SIGUSR2 = "SIGUSR2"
    SIGVTALRM = "SIGVTALRM"
    SIGWINCH = "SIGWINCH"
    SIGXCPU = "SIGXCPU"
    SIGXFSZ = "SIGXFSZ"
    SIGRTMIN = "SIGRTMIN"
    SIGRTMINPLUS1 = "SIGRTMINPLUS1"
    SIGRTMINPLUS2 = "SIGRTMINPLUS2"
    SIGRTMINPLUS3 = "SIGRTMINPLUS3"
    SIGRTMINPLUS4 = "SIGRTMINPLUS4"
    SIGRTMINPLUS5 = "SIGRTMINPLUS5"
    SIGRTMINPLUS6 = "SIGRTMINPLUS6"
    SIGRTMINPLUS7 = "SIGRTMINPLUS7"
    SIGRTMINPLUS8 = "SIGRTMINPLUS8"
    SIGRTMINPLUS9 = "SIGRTMINPLUS9"
    SIGRTMINPLUS10 = "SIGRTMINPLUS10"
    SIGRTMINPLUS11 = "SIGRTMINPLUS11"
    SIGRTMINPLUS12 = "SIGRTMINPLUS12"
    SIGRTMINPLUS13 = "SIGRTMINPLUS13"
    SIGRTMINPLUS14 = "SIGRTMINPLUS14"
    SIGRTMINPLUS15 = "SIGRTMINPLUS15"
    SIGRTMAXMINUS14 = "SIGRTMAXMINUS14"
    SIGRTMAXMINUS13 = "SIGRTMAXMINUS13"
    SIGRTMAXMINUS12 = "SIGRTMAXMINUS12"
    SIGRTMAXMINUS11 = "SIGRTMAXMINUS11"
    SIGRTMAXMINUS10 = "SIGRTMAXMINUS10"
    SIGRTMAXMINUS9 = "SIGRTMAXMINUS9"
    SIGRTMAXMINUS8 = "SIGRTMAXMINUS8"
    SIGRTMAXMINUS7 = "SIGRTMAXMINUS7"
    SIGRTMAXMINUS6 = "SIGRTMAXMINUS6"
    SIGRTMAXMINUS5 = "SIGRTMAXMINUS5"
    SIGRTMAXMINUS4 = "SIGRTMAXMINUS4"
    SIGRTMAXMINUS3 = "SIGRTMAXMINUS3"
    SIGRTMAXMINUS2 = "SIGRTMAXMINUS2"
    SIGRTMAXMINUS1 = "SIGRTMAXMINUS1"
    SIGRTMAX = "SIGRTMAX"


# Shared by containers and sandboxes.


class Int64Value(Message, frozen=True, kw_only=True):
    """An integer that may be absent."""

    value: Int64 = 0


class KeyValue(Message, frozen=True, kw_only=True):
    """An environment variable."""

    key: str
    value: str = ""


class ImageSpec(Message, frozen=True, kw_only=True):
    """An image by its name, id or digest."""

    image: str
    annotations: dict[str, str] = {}
    user_specified_image: str = ""
    runtime_handler: str = ""
    image_ref: str = ""


class IDMapping(Message, frozen=True, kw_only=True):
    """A range of user or group ids, on the host and in the container."""

    host_id: UInt32 = 0
    container_id: UInt32 = 0
    length: UInt32 = 0


class UserNamespace(Message, frozen=True, kw_only=True):
    """The user namespace of a pod."""

    mode: NamespaceMode = NamespaceMode.POD
    uids: tuple[IDMapping, ...] = ()
    gids: tuple[IDMapping, ...] = ()


class NamespaceOption(Message, frozen=True, kw_only=True):
    """Which namespaces are shared with whom."""

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    userns_options: UserNamespace | None = None


class SELinuxOption(Message, frozen=True, kw_only=True):
    """An SELinux context."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


class SecurityProfile(Message, frozen=True, kw_only=True):
    """A seccomp or AppArmor profile; `localhost_ref` only with LOCALHOST."""

    profile_type: ProfileType = ProfileType.RUNTIME_DEFAULT
    localhost_ref: str = ""


class HugepageLimit(Message, frozen=True, kw_only=True):
    """A limit in bytes for one size of huge pages, such as 2MB."""

    page_size: str = ""
    limit: UInt64 = 0


class LinuxContainerResources(Message, frozen=True, kw_only=True):
    """Limits on Linux. 0, "" and empty mean "not specified"; CPU times are in microseconds, memory in bytes."""

    cpu_period: Int64 = 0
    cpu_quota: Int64 = 0
    cpu_shares: Int64 = 0
    memory_limit_in_bytes: Int64 = 0
    oom_score_adj: Int64 = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    unified: dict[str, str] = {}
    """Name of a cgroup v2 file, such as memory.max, to its content."""
    memory_swap_limit_in_bytes: Int64 = 0


class WindowsCpuGroupAffinity(Message, frozen=True, kw_only=True):
    """The processors of one group, as a mask."""

    cpu_mask: UInt64 = 0
    cpu_group: UInt32 = 0


class WindowsContainerResources(Message, frozen=True, kw_only=True):
    """Limits on Windows."""

    cpu_shares: Int64 = 0
    cpu_count: Int64 = 0
    cpu_maximum: Int64 = 0
    memory_limit_in_bytes: Int64 = 0
    rootfs_size_in_bytes: Int64 = 0
    affinity_cpus: tuple[WindowsCpuGroupAffinity, ...] = ()


# The config of a container.


class ContainerMetadata(Message, frozen=True, kw_only=True):
    """(name, attempt) is unique within a sandbox."""

    name: str
    attempt: UInt32 = 0


class Mount(Message, frozen=True, kw_only=True):
    """A directory or file of the host, or an image, mounted in a container."""

    container_path: str = ""
    host_path: str = ""
    readonly: bool = False
    selinux_relabel: bool = False
    propagation: MountPropagation = MountPropagation.PRIVATE
    uid_mappings: tuple[IDMapping, ...] = msgspec.field(default=(), name="uidMappings")
    gid_mappings: tuple[IDMapping, ...] = msgspec.field(default=(), name="gidMappings")
    recursive_read_only: bool = False
    image: ImageSpec | None = None
    image_sub_path: str = ""


class Device(Message, frozen=True, kw_only=True):
    """A host device in a container; `permissions` is made of "rwm"."""

    container_path: str = ""
    host_path: str = ""
    permissions: str = ""


class CDIDevice(Message, frozen=True, kw_only=True):
    """A device by its Container Device Interface name: vendor.com/class=name."""

    name: str = ""


class Capability(Message, frozen=True, kw_only=True):
    """Capabilities to add and to drop."""

    add_capabilities: tuple[str, ...] = ()
    drop_capabilities: tuple[str, ...] = ()
    add_ambient_capabilities: tuple[str, ...] = ()


class LinuxContainerSecurityContext(Message, frozen=True, kw_only=True):
    """The user and the privileges of a container."""

    capabilities: Capability | None = None
    privileged: bool = False
    namespace_options: NamespaceOption | None = None
    selinux_options: SELinuxOption | None = None
    run_as_user: Int64Value | None = None
    run_as_group: Int64Value | None = None
    run_as_username: str = ""
    readonly_rootfs: bool = False
    supplemental_groups: tuple[Int64, ...] = ()
    supplemental_groups_policy: SupplementalGroupsPolicy = SupplementalGroupsPolicy.MERGE
    no_new_privs: bool = False
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None
    apparmor_profile: str = ""
    """Deprecated by the CRI, as is the next field."""
    seccomp_profile_path: str = ""


class LinuxContainerConfig(Message, frozen=True, kw_only=True):
    """The Linux part of a container's config."""

    resources: LinuxContainerResources | None = None
    security_context: LinuxContainerSecurityContext | None = None


class WindowsContainerSecurityContext(Message, frozen=True, kw_only=True):
    """The user and the privileges of a container on Windows."""

    run_as_username: str = ""
    credential_spec: str = ""
    host_process: bool = False


class WindowsContainerConfig(Message, frozen=True, kw_only=True):
    """The Windows part of a container's config."""

    resources: WindowsContainerResources | None = None
    security_context: WindowsContainerSecurityContext | None = None


class ContainerConfig(Message, frozen=True, kw_only=True):
    """A container's config."""

    metadata: ContainerMetadata
    image: ImageSpec
    command: tuple[str, ...] = ()
    """Replaces the image's entrypoint."""
    args: tuple[str, ...] = ()
    """Replaces the image's cmd."""
    working_dir: str = ""
    envs: tuple[KeyValue, ...] = ()
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    log_path: str = ""
    """A path relative to the sandbox's log_directory."""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    linux: LinuxContainerConfig | None = None
    windows: WindowsContainerConfig | None = None
    cdi_devices: tuple[CDIDevice, ...] = msgspec.field(default=(), name="CDI_devices")
    stop_signal: Signal = Signal.RUNTIME_DEFAULT


# The config of a sandbox.


class DNSConfig(Message, frozen=True, kw_only=True):
    """The content of a sandbox's resolv.conf."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class PortMapping(Message, frozen=True, kw_only=True):
    """A host port mapped to a sandbox's port."""

    protocol: Protocol = Protocol.TCP
    container_port: Int32 = 0
    host_port: Int32 = 0
    host_ip: str = ""


class LinuxSandboxSecurityContext(Message, frozen=True, kw_only=True):
    """The user and the privileges of a sandbox's own processes."""

    namespace_options: NamespaceOption | None = None
    selinux_options: SELinuxOption | None = None
    run_as_user: Int64Value | None = None
    run_as_group: Int64Value | None = None
    readonly_rootfs: bool = False
    supplemental_groups: tuple[Int64, ...] = ()
    supplemental_groups_policy: SupplementalGroupsPolicy = SupplementalGroupsPolicy.MERGE
    privileged: bool = False
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None
    seccomp_profile_path: str = ""
    """Deprecated by the CRI."""


class LinuxPodSandboxConfig(Message, frozen=True, kw_only=True):
    """The Linux part of a sandbox's config."""

    cgroup_parent: str = ""
    security_context: LinuxSandboxSecurityContext | None = None
    sysctls: dict[str, str] = {}
    overhead: LinuxContainerResources | None = None
    resources: LinuxContainerResources | None = None


class WindowsNamespaceOption(Message, frozen=True, kw_only=True):
    """The network namespace used on Windows."""

    network: NamespaceMode = NamespaceMode.POD


class WindowsSandboxSecurityContext(Message, frozen=True, kw_only=True):
    """The user and the privileges of a sandbox's own processes on Windows."""

    run_as_username: str = ""
    credential_spec: str = ""
    host_process: bool = False
    namespace_options: WindowsNamespaceOption | None = None


class WindowsPodSandboxConfig(Message, frozen=True, kw_only=True):
    """The Windows part of a sandbox's config."""

    security_context: WindowsSandboxSecurityContext | None = None


class PodSandboxMetadata(Message, frozen=True, kw_only=True):
    """The parts of a sandbox's name."""

    name: str
    uid: str = ""
    namespace: str = ""
    attempt: UInt32 = 0


class PodSandboxConfig(Message, frozen=True, kw_only=True):
    """A sandbox's config."""

    metadata: PodSandboxMetadata
    hostname: str = ""
    log_directory: str = ""
    dns_config: DNSConfig | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    linux: LinuxPodSandboxConfig | None = None
    windows: WindowsPodSandboxConfig | None = None


# A container's status.


class ContainerResources(Message, frozen=True, kw_only=True):
    """The limits in force."""

    linux: LinuxContainerResources | None = None
    windows: WindowsContainerResources | None = None


class LinuxContainerUser(Message, frozen=True, kw_only=True):
    """The user that a container's first process was started as."""

    uid: Int64 = 0
    gid: Int64 = 0
    supplemental_groups: tuple[Int64, ...] = ()


class ContainerUser(Message, frozen=True, kw_only=True):
    """The user that a container was started as, by platform."""

    linux: LinuxContainerUser | None = None


class ContainerStatus(Message, frozen=True, kw_only=True):
    """A container's status in the CRI. Times are nanoseconds since the epoch; 0 is "not yet" and is not written."""

    id: str
    metadata: ContainerMetadata
    state: ContainerStateName
    created_at: Int64 = 0
    started_at: Int64 = 0
    finished_at: Int64 = 0
    exit_code: Int32 = 0
    """Meaningful once `finished_at` is set."""
    image: ImageSpec
    image_ref: str = ""
    reason: str = ""
    message: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    mounts: tuple[Mount, ...] = ()
    log_path: str = ""
    resources: ContainerResources | None = None
    image_id: str = ""
    user: ContainerUser | None = None
    stop_signal: Signal = Signal.RUNTIME_DEFAULT


# A sandbox's status.


class PodIP(Message, frozen=True, kw_only=True):
    """An address of a sandbox."""

    ip: str = ""


class PodSandboxNetworkStatus(Message, frozen=True, kw_only=True):
    """The addresses of a sandbox; none if it is in the host's network."""

    ip: str = ""
    """The primary one."""
    additional_ips: tuple[PodIP, ...] = ()


class Namespace(Message, frozen=True, kw_only=True):
    """The namespaces of a sandbox."""

    options: NamespaceOption | None = None


class LinuxPodSandboxStatus(Message, frozen=True, kw_only=True):
    """The Linux part of a sandbox's status."""

    namespaces: Namespace | None = None


class PodSandboxStatus(Message, frozen=True, kw_only=True):
    """A sandbox's status in the CRI. Times are nanoseconds since the epoch."""

    id: str
    metadata: PodSandboxMetadata
    state: PodSandboxStateName
    created_at: Int64 = 0
    network: PodSandboxNetworkStatus | None = None
    linux: LinuxPodSandboxStatus | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    runtime_handler: str = ""


def parse_container_config(
    data: bytes | str | Mapping[str, Any] | ContainerConfig, *, strict: bool = False
) -> ContainerConfig:
    """Return a container's config from JSON (crictl's form or protobuf's), YAML (crictl's), a mapping, or a message.

    Fields that the CRI does not have are ignored, as crictl does, and named in a warning of the logger limpet.config;
    `strict` refuses them. Raises InvalidInputError, naming the field and the value, if it is not a complete and valid
    config.
    """
    return read_message(ContainerConfig, data, "container config", strict=strict)


def parse_pod_sandbox_config(
    data: bytes | str | Mapping[str, Any] | PodSandboxConfig, *, strict: bool = False
) -> PodSandboxConfig:
    """Return a sandbox's config from JSON (crictl's form or protobuf's), YAML (crictl's), a mapping, or a message.

    Fields that the CRI does not have are ignored, as crictl does, and named in a warning of the logger limpet.config;
    `strict` refuses them. Raises InvalidInputError, naming the field and the value, if it is not a complete and valid
    config.
    """
    return read_message(PodSandboxConfig, data, "sandbox config", strict=strict)
