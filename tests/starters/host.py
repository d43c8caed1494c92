"""Containers of the process starter, with the host's own root."""

from limpet import Engine
from limpet.engine.lifecycle.container import Container


def make(engine: Engine, key: str, *command: str, **fields: object) -> Container:
    config = {"metadata": {"name": key}, "image": {"image": "host"}, "command": list(command), **fields}
    return engine.create_container(config, "jobs", id=key)
