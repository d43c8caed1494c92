"""Records that many tests use: a sandbox, containers in it, a status that runs, and a probe that sees nothing."""

from limpet.recovery import Boot, Observation, Process
from limpet.schema import ImageManifest, ImageName, Metadata, SandboxMetadata, Status
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config

RUNNING = Status(created_at=1, started_at=2, pid=7)
IMAGE = ImageManifest(name=ImageName("host"))


def metadata(name: str, sandbox_id: str = "s", **labels: str) -> Metadata:
    config = parse_container_config({"metadata": {"name": name}, "image": {"image": "host"}, "labels": labels})
    return Metadata(id=name, name=name, sandbox_id=sandbox_id, config=config, image_manifest=IMAGE)


def sandbox(name: str = "s") -> SandboxMetadata:
    config = parse_pod_sandbox_config({"metadata": {"name": name, "uid": "u", "namespace": "n"}})
    return SandboxMetadata(id=name, name=name, config=config, created_at=1)


class Blind:
    """A probe that may not look."""

    def observe(self, container: object) -> Observation:
        return Observation(boot=Boot.SAME, process=Process.HIDDEN)
