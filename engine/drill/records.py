"""The records in the drill's stores, and a probe that knows the state of its processes without looking."""

from limpet.recovery.evidence import Boot, Observation, Process
from limpet.recovery.probe import Subject
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.identity import ProcessIdentity
from limpet.schema.image import ImageManifest, ImageName
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.status import Status

IDENTITY = ProcessIdentity(pid=1, start_ticks=2, boot_id="a boot", pidfd_inode=3, pid_namespace=4)
RUNNING = Status(created_at=1, started_at=2, pid=1)
SANDBOX = SandboxMetadata(
    id="s",
    name="s",
    config=parse_pod_sandbox_config({"metadata": {"name": "s", "uid": "u", "namespace": "n"}}),
    created_at=1,
)


class Answer:
    """A probe that reports every process as alive, or every process as gone."""

    def __init__(self, seen: Process) -> None:
        self._seen = seen

    def observe(self, container: Subject) -> Observation:  # noqa: ARG002  # it knows without looking
        """Return the observation it was told to return."""
        return Observation(boot=Boot.SAME, process=self._seen)


def make_metadata(name: str) -> Metadata:
    """Return the metadata of a container with that name."""
    config = parse_container_config({"metadata": {"name": name}, "image": {"image": "host"}})
    return Metadata(
        id=name, name=name, sandbox_id="s", config=config, image_manifest=ImageManifest(name=ImageName("host"))
    )
