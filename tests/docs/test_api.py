"""The API reference has every public name. `make docs` builds it, and takes a warning for an error."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "api"
DOORS = (
    "limpet",
    "limpet.engine",
    "limpet.engine.fleet",
    "limpet.engine.images",
    "limpet.engine.inspection",
    "limpet.engine.logs",
    "limpet.engine.starters",
    "limpet.recovery",
    "limpet.schema",
    "limpet.testing",
)


@pytest.mark.parametrize("door", DOORS)
def test_every_public_name_is_in_the_reference(door: str) -> None:
    """A page describes the whole package, or each name that it exports, under whichever of its names."""
    described = set(
        re.findall(r"^::: ([\w.]+)$", "".join(page.read_text() for page in PAGES.glob("*.md")), re.MULTILINE)
    )
    assert described
    if door in described:
        return
    targets = [resolve(target) for target in described]
    for name in import_module(door).__all__:
        value = getattr(import_module(door), name)
        if name == "__version__":
            assert f"{door}.{name}" in (PAGES / "index.md").read_text()
            continue
        assert any(value is target or is_defined_in(target, value) for target in targets), name


def is_defined_in(module: object, value: object) -> bool:
    return inspect.ismodule(module) and getattr(value, "__module__", None) == module.__name__


def resolve(target: str) -> object:
    """Return what a directive of the reference is about."""
    try:
        return import_module(target)
    except ModuleNotFoundError:
        module, _, name = target.rpartition(".")
        value: object = getattr(import_module(module), name)
        return value
