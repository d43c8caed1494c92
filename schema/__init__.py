"""What is stored: records, tables, migrations. No I/O, no policy.

Read `status` and `metadata` (the two halves of a container), then `identity`, `tables` and `codec` (how they lie on
disk), and `errors`.
"""

from limpet.schema.cri import ContainerConfig, ContainerStatus, LinuxContainerResources, PodSandboxConfig
from limpet.schema.identity import ProcessIdentity
from limpet.schema.image import ImageConfig, ImageManifest, ImageName, MountType
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.status import ContainerState, Reason, Resources, Status

__all__ = [
    "ContainerConfig",
    "ContainerState",
    "ContainerStatus",
    "ImageConfig",
    "ImageManifest",
    "ImageName",
    "LinuxContainerResources",
    "Metadata",
    "MountType",
    "PodSandboxConfig",
    "ProcessIdentity",
    "Reason",
    "Resources",
    "SandboxMetadata",
    "Status",
]
