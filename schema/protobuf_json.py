"""Protobuf messages as JSON or YAML, read into msgspec structs strictly and written in both spellings.

A field is read by its proto name (log_path) and by its lower camel case name (logPath). As protobuf's JSON
mapping has it: null means "not set", an integer may be a string, an enum value is given by name or
by number. A field that the message does not have is ignored with a warning in the log, or refused if asked for.
Anything else that is not understood is refused, not skipped. Every refusal is an InvalidInputError with the full path
of the field and the value.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn, TypeVar

import msgspec
from msgspec import inspect

from limpet.schema.any_text import plain
from limpet.schema.errors import InvalidInputError
from limpet.schema.telling import get_log
from limpet.schema.yaml_text import read_yaml

_log = get_log("limpet.config")

MAX_BYTES = 4 << 20
"""The limit for one message as JSON: gRPC's default limit for a message."""

Message = TypeVar("Message", bound=msgspec.Struct)

_NAMED_FIELDS = 5
"""So many unknown fields are named; the rest are counted."""
_MAX_DIGITS = 640
"""Python always converts this many digits, however it is configured (sys.int_info.str_digits_check_threshold)."""
_INTEGER = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_PYTHON_TO_JSON = {"None": "null", "True": "true", "False": "false"}
_MAX_UINT32 = 2**32 - 1
_MAX_UINT64 = 2**64 - 1


def read_message(
    message_type: type[Message], data: bytes | str | Mapping[str, Any] | Message, what: str, *, strict: bool = False
) -> Message:
    """Return the message in `data`: text (JSON if it begins with "{", else YAML), a mapping, or a message to check.

    Fields that the message does not have are ignored, and named in a warning of the logger limpet.config; with
    `strict` they are refused. Each error message begins with `what`. Raises InvalidInputError, and nothing else, for
    invalid data.
    """
    reading = _Reading(strict=strict)
    try:
        value: object = data
        if isinstance(data, (bytes, str)):
            text = _decode(data)
            reading.is_yaml = not text.lstrip().startswith("{")  # how crictl tells them apart
            value = read_yaml(text) if reading.is_yaml else _parse(text)
        message: Message = _read_message(_kind(message_type), value, "", reading)
        _require_size(len(msgspec.json.encode(message)))
    except InvalidInputError as error:
        raise InvalidInputError(f"{what}: {error}") from error.__cause__
    if reading.notes:
        _log.warning("%s: ignored: %s", what, reading)
    return message


class _Reading:
    """How a message is read, and the fields in it that it does not have."""

    def __init__(self, *, strict: bool) -> None:
        self.is_yaml = False
        self._strict = strict
        self._count = 0
        self.notes: list[str] = []

    def add_unknown(self, message_type: type, key: object, place: str) -> None:
        """Note a field. Raises InvalidInputError if none is allowed."""
        if self._strict:
            raise InvalidInputError(_unknown_field(message_type, key, place))
        self._count += 1
        if self._count <= _NAMED_FIELDS:  # looking for a similar name takes its time
            self.notes.append(_unknown_field(message_type, key, place))

    def __str__(self) -> str:
        more = f"; and {self._count - _NAMED_FIELDS} more" if self._count > _NAMED_FIELDS else ""
        return "; ".join(self.notes) + more


def to_json(message: msgspec.Struct, *, camel_case: bool = False) -> bytes:
    """Return `message` as JSON without the fields that have their default value.

    In snake case names are those of the proto file and integers are numbers, as in the store. In camel
    case it is protobuf's canonical JSON, with 64-bit integers in strings, as CRI clients print it.
    """
    if not camel_case:
        return msgspec.json.encode(message)
    return msgspec.json.encode(_to_canonical(_kind(type(message)), msgspec.to_builtins(message)))


def camel_case_name(name: str) -> str:
    """Return the JSON name that protoc gives a field: log_path is logPath, CDI_devices is CDIDevices."""
    head, *rest = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


def _decode(data: bytes | str) -> str:
    _require_size(len(data))
    try:
        text = data.decode() if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"not UTF-8: {error}") from error
    return text.removeprefix("\ufeff")  # a byte order mark


def _parse(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_to_dict, parse_int=_to_integer, parse_constant=_refuse_constant)
    except InvalidInputError:
        raise
    except ValueError as error:
        raise InvalidInputError(f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidInputError("it is nested too deeply") from error


def _to_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members: dict[str, object] = {}
    for key, value in pairs:
        if key in members:
            raise InvalidInputError(f"the key {_show(key)} appears twice in one object; remove one")
        members[key] = value
    return members


def _to_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise InvalidInputError(f"{digits[:20]}... has {len(digits)} digits, too many for any field")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidInputError(f"not valid JSON: {name} is not a JSON number")


def _require_size(size: int) -> None:
    if size > MAX_BYTES:
        raise InvalidInputError(f"it has {size} bytes, the limit is {MAX_BYTES}")


@cache
def _kind(message_type: type[msgspec.Struct]) -> Any:
    """Return msgspec's description of the message: an inspect.StructType."""
    return inspect.type_info(message_type)


@cache
def _spellings(message_type: type[msgspec.Struct]) -> dict[str, inspect.Field]:
    """Map each accepted name of each field to the field."""
    return {
        spelling: field
        for field in _kind(message_type).fields
        for name in (field.name, field.encode_name)
        for spelling in (name, camel_case_name(name))
    }


def _read(kind: inspect.Type, value: object, path: str, reading: _Reading) -> Any:
    return _READERS[type(kind)](kind, value, path, reading)


def _read_message(kind: Any, value: object, path: str, reading: _Reading) -> Any:
    if isinstance(value, kind.cls):
        value = msgspec.structs.asdict(value)  # a message, which its constructor did not check
    if not isinstance(value, Mapping):
        _refuse(path, "an object", value)
    spellings = _spellings(kind.cls)
    given: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, member in value.items():
        place = _join(path, key)
        field = spellings.get(key)
        if field is None:
            reading.add_unknown(kind.cls, key, place)
            continue
        if field.name in spelled:
            raise InvalidInputError(f"`{place}` is also given as {spelled[field.name]}; remove one")
        spelled[field.name] = key
        if member is not None:
            given[field.name] = _read(field.type, member, place, reading)
    for field in kind.fields:
        # Proto3 cannot tell an empty string from an absent one, so neither satisfies a required field.
        if field.required and given.get(field.name, "") == "":
            raise InvalidInputError(f"`{_join(path, field.encode_name)}` is required and must not be empty")
    return kind.cls(**given)


def _read_optional(kind: Any, value: object, path: str, reading: _Reading) -> Any:
    return _read(_inner(kind), value, path, reading)


def _read_list(kind: Any, value: object, path: str, reading: _Reading) -> Any:
    if not isinstance(value, (list, tuple)):
        _refuse(path, "a list", value)
    return tuple(_read(kind.item_type, item, f"{path}[{index}]", reading) for index, item in enumerate(value))


def _read_map(kind: Any, value: object, path: str, reading: _Reading) -> Any:
    if not isinstance(value, Mapping):
        _refuse(path, "an object", value)
    places = [(f"{path}[{_show(key)}]", key, member) for key, member in value.items()]
    return {
        _read(kind.key_type, key, place, reading): _read(kind.value_type, member, place, reading)
        for place, key, member in places
    }


def _read_enum(kind: Any, value: object, path: str, _reading: _Reading) -> Any:
    names = [member.value for member in kind.cls]
    if isinstance(value, str) and value in names:
        return kind.cls(value)
    if type(value) is int and 0 <= value < len(names):
        return kind.cls(names[value])
    listed = f"one of {', '.join(names)}" if len(names) <= 8 else f"a {kind.cls.__name__} such as {names[0]}"
    near = _nearest(_as_enum_name(value) if isinstance(value, str) else value, names)
    hint = f"; did you mean {near}?" if near else ""
    return _refuse(path, f"{listed} or a number from 0 to {len(names) - 1}", value, hint)


def _read_integer(kind: Any, value: object, path: str, _reading: _Reading) -> Any:
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value)
    lowest, highest = kind.ge, _highest(kind)
    if type(value) is not int or not lowest <= value <= highest:
        _refuse(path, f"an integer from {lowest} to {highest}", value)
    return value


def _read_bool(_kind: Any, value: object, path: str, _reading: _Reading) -> Any:
    return value if isinstance(value, bool) else _refuse(path, "true or false", value)


def _read_string(_kind: Any, value: object, path: str, reading: _Reading) -> Any:
    if reading.is_yaml and isinstance(value, (bool, int, float)):
        value = json.dumps(value)  # written without quotes, as in `args: [sleep, 600]`
    if not isinstance(value, str):
        _refuse(path, "a string", value)
    if not is_text(value):
        _refuse(path, "without NUL characters and lone surrogates", value)
    return plain(value)


_READERS: dict[type[inspect.Type], Callable[[Any, object, str, _Reading], Any]] = {
    inspect.StructType: _read_message,
    inspect.UnionType: _read_optional,
    inspect.VarTupleType: _read_list,
    inspect.DictType: _read_map,
    inspect.EnumType: _read_enum,
    inspect.IntType: _read_integer,
    inspect.BoolType: _read_bool,
    inspect.StrType: _read_string,
}


def _inner(kind: inspect.UnionType) -> inspect.Type:
    """Return the X of `X | None`, the only kind of union in messages."""
    (inner,) = (member for member in kind.types if not isinstance(member, inspect.NoneType))
    return inner


def _highest(kind: inspect.IntType) -> int:
    return _MAX_UINT64 if kind.le is None else kind.le  # msgspec's own bounds end at int64


def _to_canonical(kind: Any, value: Any) -> Any:
    match kind:
        case inspect.StructType():
            types = {field.encode_name: field.type for field in kind.fields}
            return {camel_case_name(name): _to_canonical(types[name], member) for name, member in value.items()}
        case inspect.UnionType():
            return _to_canonical(_inner(kind), value)
        case inspect.VarTupleType():
            return [_to_canonical(kind.item_type, item) for item in value]
        case inspect.IntType() if _highest(kind) > _MAX_UINT32:
            return str(value)
    return value


def is_text(value: object) -> bool:
    """Return whether it can be passed to a program, which a NUL cannot, and stored, which no lone surrogate can."""
    return isinstance(value, str) and "\0" not in value and is_utf8(value)


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8, that is, has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unknown_field(message_type: type, key: object, place: str) -> str:
    near = _nearest(key, list(_spellings(message_type)))
    names = ", ".join(field.encode_name for field in _kind(message_type).fields)
    hint = f"did you mean {near}?" if near else f"it has {names}"
    return f"`{place}` is not a field of {message_type.__name__}; {hint}"


def _as_enum_name(text: str) -> str:
    """Return a name as the CRI writes it: what others call SIGRTMIN+3, or sigterm, is SIGRTMINPLUS3, and SIGTERM."""
    return text[:80].upper().replace("+", "PLUS").replace("-", "MINUS")


def _nearest(name: object, names: list[str]) -> str:
    matches = difflib.get_close_matches(name[:80], names, n=1) if isinstance(name, str) else []
    return matches[0] if matches else ""


def _join(path: str, key: object) -> str:
    step = key if isinstance(key, str) and key.isidentifier() and len(key) <= 80 else _show(key)
    return f"{path}.{step}" if path else step


def _refuse(path: str, expected: str, value: object, hint: str = "") -> NoReturn:
    subject = f"`{path}`" if path else "the top level"
    raise InvalidInputError(f"{subject} must be {expected}, not {_show(value)}{hint}")


def _show(value: object) -> str:
    match value:
        case str() if len(value) > 80:
            return f"{value[:60]!r}... ({len(value)} characters)"
        case int() if value.bit_length() > 256:  # Python refuses to print very long integers
            return f"an integer of {value.bit_length()} bits"
        case None | bool() | str() | int() | float():
            return _PYTHON_TO_JSON.get(repr(value), repr(value))
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
    return f"a Python {type(value).__name__}"
