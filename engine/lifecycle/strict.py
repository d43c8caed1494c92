"""What is refused with `strict`: a config that asks for what the starter does not do."""

from collections.abc import Mapping

from limpet.engine.starters import Launch, Starter
from limpet.schema.cri import ContainerConfig, ContainerMetadata, ImageSpec
from limpet.schema.errors import InvalidInputError
from limpet.schema.image import ImageManifest, ImageName
from limpet.schema.metadata import Metadata, SandboxMetadata

_OF_SANDBOX = "sandbox."
_IMAGE = ImageManifest(name=ImageName("any"), layers=("any",))


def refuse_unapplied(
    starter: Starter, metadata: Metadata, sandbox: SandboxMetadata, namespaces: Mapping[str, str]
) -> None:
    """Raise InvalidInputError if the starter does not do all that a container's config, and its sandbox's, ask for."""
    found = starter.find_unapplied(_launch(metadata, sandbox, namespaces))
    if found:
        raise InvalidInputError(f"container {metadata.name!r}: not done by this starter: {_tell(found)}")


def refuse_unapplied_sandbox(starter: Starter, sandbox: SandboxMetadata, namespaces: Mapping[str, str]) -> None:
    """Raise InvalidInputError if the starter does not do for a container of an image all that a sandbox asks for."""
    config = ContainerConfig(metadata=ContainerMetadata(name="any"), image=ImageSpec(image="any"))
    any_one = Metadata(id=sandbox.id, name="any", sandbox_id=sandbox.id, config=config, image_manifest=_IMAGE)
    unapplied = starter.find_unapplied(_launch(any_one, sandbox, namespaces))
    found = {name: why for name, why in unapplied.items() if name.startswith(_OF_SANDBOX)}
    if found:
        raise InvalidInputError(f"sandbox {sandbox.name!r}: not done by this starter: {_tell(found)}")


def _launch(metadata: Metadata, sandbox: SandboxMetadata, namespaces: Mapping[str, str]) -> Launch:
    return Launch(
        id=metadata.id, bundle_path=metadata.root_dir, metadata=metadata, sandbox=sandbox, namespaces=namespaces
    )


def _tell(found: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in found.items())
