"""An OCI image made of the host's shell and a few tools, with the libraries that they need."""

import re
import subprocess
from pathlib import Path
from typing import Any

from limpet.engine import Engine
from limpet.schema import ImageName
from tests import oci_layout

TOOLS = ("sh", "cat", "ls", "id", "sleep", "test", "env", "setsid")


def load_tools(engine: Engine, directory: Path, config: dict[str, Any], *members: tuple[Any, bytes]) -> ImageName:
    """Load the image, with `config` as its configuration's and with more members, under the directory's name."""
    write_tools(directory, config, *members)
    (name,) = engine.images.load(str(directory))
    return name


def write_tools(directory: Path, config: dict[str, Any], *members: tuple[Any, bytes]) -> None:
    """Write the image's layout into a directory."""
    layout = oci_layout.Layout(directory)
    layout.add_image([oci_layout.tar(*members, *_tools())], f"{directory.name}:1", configuration={"config": config})


def _tools() -> list[tuple[Any, bytes]]:
    found, libraries = [], set()
    for tool in TOOLS:
        path = _run("sh", "-c", f"PATH=/usr/bin:/bin which {tool}").strip()
        found.append(oci_layout.member(f"bin/{tool}", Path(path).read_bytes(), mode=0o755))
        libraries |= set(re.findall(r"(/\S+)", _run("ldd", path)))
    return found + [
        oci_layout.member(path.lstrip("/"), Path(path).read_bytes(), mode=0o755) for path in sorted(libraries)
    ]


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
