"""Containers of the process starter, with the host's own root, and what there is of this process's children."""

import os
from pathlib import Path

from limpet import Engine
from limpet.engine.lifecycle.container import Container


def make(engine: Engine, key: str, *command: str, **fields: object) -> Container:
    config = {"metadata": {"name": key}, "image": {"image": "host"}, "command": list(command), **fields}
    return engine.create_container(config, "jobs", id=key)


def list_children() -> set[str]:
    """Return the pids of this process's children, zombies and orphans that came to it included."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
