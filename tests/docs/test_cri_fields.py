"""docs/cri-fields.md lists every field of the two configs, and what it says of kept and told ones is true."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from limpet.engine import Engine
from limpet.schema.cri import ContainerConfig, PodSandboxConfig
from limpet.schema.errors import InvalidInputError
from limpet.schema.protobuf_json import to_json

PAGE = (Path(__file__).parents[2] / "docs" / "cri-fields.md").read_text()
CONFIGS: Mapping[str, type[msgspec.Struct]] = {
    "ContainerConfig": ContainerConfig,
    "PodSandboxConfig": PodSandboxConfig,
}
CLASSES = {"acts", "kept", "told"}
CRI_NAMES = {"cdi_devices": "CDI_devices"}
"""Fields whose name in Python differs from the proto file's, at the places that the page lists."""
BASE = {"metadata": {"name": "one"}, "image": {"image": "host"}, "command": ["true"]}


def read_rows(config: str) -> dict[str, str]:
    """Return each field of a config's table with its class."""
    section = PAGE.partition(f"\n## {config}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([\w.]+)` \| (\w+) \|", section, re.MULTILINE))


def walk(kind: inspect.Type, path: str = "") -> Iterator[tuple[str, inspect.Type]]:
    """Yield the path of each field, at any depth, and its type without "or None"."""
    assert isinstance(kind, inspect.StructType)
    for field in kind.fields:
        inner, name = strip(field.type), CRI_NAMES.get(field.name, field.name)
        yield path + name, inner
        if isinstance(inner, inspect.StructType):
            yield from walk(inner, f"{path}{name}.")


def parents(path: str) -> Iterator[str]:
    """Yield the messages that a field is in, innermost first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def make_value(kind: inspect.Type) -> Any:
    """Return a value of this type that is not its default."""
    match kind:
        case inspect.StrType():
            return "x"
        case inspect.IntType():
            return 1
        case inspect.BoolType():
            return True
        case inspect.EnumType(cls=members):
            return list(members)[-1].value
        case inspect.VarTupleType(item_type=item):
            return [make_value(item)]
        case inspect.DictType():
            return {"x": "x"}
        case inspect.StructType(fields=fields):
            return {field.encode_name: make_value(strip(field.type)) for field in fields}
    raise AssertionError(kind)


def strip(kind: inspect.Type) -> inspect.Type:
    """Return a type without "or None"."""
    if isinstance(kind, inspect.UnionType):
        (kind,) = (each for each in kind.types if not isinstance(each, inspect.NoneType))
    return kind


def put(base: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    """Return a copy of a config with one field set."""
    name, _, rest = path.partition(".")
    return {**base, name: put(base.get(name, {}), rest, value) if rest else value}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_has_a_row(config: str) -> None:
    """Each field of the struct has a row, or is in a message that has one; and there is no other row."""
    rows = read_rows(config)
    fields = dict(walk(inspect.type_info(CONFIGS[config])))
    assert set(rows) <= set(fields)
    assert set(rows.values()) <= CLASSES
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
            wanted = {f"sandbox.{name}" for name in config["linux"]} if path == "linux" else {f"sandbox.{path}"}
            assert set(told) == wanted
