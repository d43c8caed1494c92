"""docs/cri-fields.md lists every field of the two configs, and what it says of kept and told ones is true."""

from typing import Any

import msgspec
import pytest
from msgspec import inspect

from limpet.engine import Engine
from limpet.schema.cri import ContainerConfig, PodSandboxConfig
from limpet.schema.errors import InvalidInputError
from limpet.schema.protobuf_json import to_json
from tests.cri_page import CLASSES, CONFIGS, make_value, parents, put, read_rows, walk

BASE = {"metadata": {"name": "one"}, "image": {"image": "host"}, "command": ["true"]}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_has_a_row(config: str) -> None:
    """Each field of the struct has a row, or is in a message that has one; and there is no other row."""
    rows = read_rows(config)
    fields = dict(walk(inspect.type_info(CONFIGS[config])))
    assert set(rows) <= set(fields)
    assert set(rows.values()) | set(read_rows(config, of_oci=True).values()) <= CLASSES
    missing = [
        path
        for path, kind in fields.items()
        if not isinstance(kind, inspect.StructType) and not {path, *parents(path)} & set(rows)
    ]
    assert not missing


def test_what_is_kept_comes_back(state_dir: str) -> None:
    """A value in each field that is said to be kept is accepted, and is there when the store is opened again."""
    kept = {}
    for config, base in (("ContainerConfig", BASE), ("PodSandboxConfig", {"metadata": {"name": "one"}})):
        fields = dict(walk(inspect.type_info(CONFIGS[config])))
        full: dict[str, Any] = dict(base)
        for path, effect in read_rows(config).items():
            if effect == "kept":
                full = put(full, path, make_value(fields[path]))
        kept[config] = full
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox(kept["PodSandboxConfig"])
        container = engine.create_container(kept["ContainerConfig"], sandbox.id)
        container.start()
        assert container.wait(10).exit_code == 0
    with Engine.open(state_dir) as engine:
        for given, found in (
            (kept["PodSandboxConfig"], engine.get_sandbox(sandbox.id).metadata.config),
            (kept["ContainerConfig"], engine.get(container.id).metadata.config),
        ):
            assert msgspec.json.decode(to_json(found)) == given


def test_what_is_told_is_told(state_dir: str) -> None:
    """A value in each field that is said to be told is named in the status, with a reason, and refused if strict."""
    fields = dict(walk(inspect.type_info(ContainerConfig)))
    sandbox_fields = dict(walk(inspect.type_info(PodSandboxConfig)))
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "one"}}, id="one")
        for path in (path for path, effect in read_rows("ContainerConfig").items() if effect == "told"):
            name = path.rpartition(".")[2]
            asked = put(BASE, path, make_value(fields[path]))
            with pytest.raises(InvalidInputError, match=rf": {name} \("):
                engine.create_container(asked, "one", strict=True)
            container = engine.create_container(asked, "one")
            assert list(container.status.unapplied) == [name]
            container.release()
            container.delete()
        for path in (path for path, effect in read_rows("PodSandboxConfig").items() if effect == "told"):
            config = put({"metadata": {"name": path}}, path, make_value(sandbox_fields[path]))
            sandbox = engine.create_sandbox(config)
            told = engine.create_container(BASE, sandbox.id).status.unapplied
            assert set(told) == {f"sandbox.{path.removeprefix('linux.').partition('.')[0]}"}
