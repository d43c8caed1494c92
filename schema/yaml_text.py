"""YAML as crictl's files have it, read as the plain values that JSON would give."""

import re
from collections.abc import Callable
from typing import Any

from limpet.schema.errors import InvalidInputError

MAX_YAML_BYTES = 256 << 10
"""The limit for a message as YAML, which people write; programs write JSON."""

_MAX_DEPTH = 64
"""Deeper than any message of CRI. PyYAML's time grows with the square of the depth: seconds for a thousand brackets."""
_MAX_DIGITS = 640
_TAG = "tag:yaml.org,2002:"
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_TRUE = frozenset({"true", "yes", "on"})
_PLAIN = frozenset({"str", "timestamp", "value", "merge"})
"""A date is text here, as for Go's reader."""


def read_yaml(text: str) -> Any:
    """Return the value of the first document: mappings with strings as keys, lists, scalars; None if there is none.

    Raises InvalidInputError if it is not valid, has a key twice, a tag or an alias (with which a short text can stand
    for an endless one), is nested too deeply, or longer than MAX_YAML_BYTES.
    """
    import yaml  # noqa: PLC0415 - most configs are JSON

    if len(text) > MAX_YAML_BYTES:
        raise InvalidInputError(
            f"it has {len(text)} characters of YAML, the limit is {MAX_YAML_BYTES}; give it as JSON"
        )
    try:
        loader = yaml.SafeLoader(text)
        loader.compose_node = _bounded(loader.compose_node)
        return _value(loader.get_node(), set()) if loader.check_node() else None
    except InvalidInputError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidInputError(f"not valid YAML: {' '.join(str(error).split())[:200]}") from error


def _bounded(compose_node: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return PyYAML's function for one node, which calls itself for those within, with a bound to the depth."""
    depth = 0

    def compose(parent: Any, index: Any) -> Any:
        nonlocal depth
        if depth == _MAX_DEPTH:
            raise InvalidInputError(f"it is nested too deeply, more than {_MAX_DEPTH} levels")
        depth += 1
        node = compose_node(parent, index)
        depth -= 1
        return node

    return compose


def _value(node: Any, seen: set[int]) -> Any:
    if id(node) in seen:
        raise InvalidInputError("it has a YAML alias (*name); write out what it stands for")
    seen.add(id(node))
    tag = node.tag.removeprefix(_TAG)
    match node.id, tag:
        case "mapping", "map":
            return _mapping(node, seen)
        case "sequence", "seq":
            return [_value(item, seen) for item in node.value]
        case "scalar", _:
            return _scalar(tag, node.value)
    raise _refuse_tag(tag)


def _mapping(node: Any, seen: set[int]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in node.value:
        if key.id != "scalar":
            raise InvalidInputError("it has a YAML key that is a list or a mapping; only text can be a key")
        if key.value in members:
            raise InvalidInputError(f"the key {key.value[:80]!r} appears twice in one mapping; remove one")
        members[key.value] = _value(value, seen)
    return members


def _scalar(tag: str, text: str) -> Any:
    if tag in _PLAIN:
        return text
    match tag:
        case "null":
            return None
        case "bool":
            return text.lower() in _TRUE
        case "int" if ":" not in text:  # 22:22 is no number to the base of 60
            return _integer(text)
        case "int" | "float":
            try:
                return float(text.replace("_", ""))
            except ValueError:
                return text
    raise _refuse_tag(tag)


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise InvalidInputError(f"{text[:20]}... has {len(text)} digits, too many for any field")
    return int(text.replace("_", ""), 8 if _OCTAL.fullmatch(text) else 0)


def _refuse_tag(tag: str) -> InvalidInputError:
    return InvalidInputError(f"it has the YAML tag {tag[:80]!r}; only plain text, numbers, lists and mappings are read")
