"""The records that the drill's stores hold, and a probe that knows how its processes are without looking."""

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
    """A probe that finds every process alive, or every one gone."""

    def __init__(self, seen: Process) -> None:
        self._seen = seen

    def observe(self, container: Subject) -> Observation:  # noqa: ARG002  # it knows without looking
        """Say what it was told to say."""
        return Observation(boot=Boot.SAME, process=self._seen)


def make_metadata(name: str) -> Metadata:
    """Return the metadata of a container of that name."""
    config = parse_container_config({"metadata": {"name": name}, "image": {"image": "host"}})
    return Metadata(
        id=name, name=name, sandbox_id="s", config=config, image_manifest=ImageManifest(name=ImageName("host"))
    )
