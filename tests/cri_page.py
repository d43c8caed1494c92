"""docs/cri-fields.md as data, and walks over the fields of the CRI's configs."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from limpet.schema.cri import ContainerConfig, PodSandboxConfig

PAGE = (Path(__file__).parents[1] / "docs" / "cri-fields.md").read_text()
CONFIGS: Mapping[str, type[msgspec.Struct]] = {
    "ContainerConfig": ContainerConfig,
    "PodSandboxConfig": PodSandboxConfig,
}
CLASSES = {"acts", "kept", "told"}
CRI_NAMES = {"cdi_devices": "CDI_devices"}
"""Fields whose name in Python differs from the proto file's, at the places that the page lists."""


def read_rows(config: str, *, of_oci: bool = False) -> dict[str, str]:
    """Return each field of a config's table with its class, by the built-in starter or by an OCI runtime."""
    section = PAGE.partition(f"\n## {config}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \| (\w+) \|", section, re.MULTILINE)
    return {path: oci if of_oci else processes for path, processes, oci in rows}


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
