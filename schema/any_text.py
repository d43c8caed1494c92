"""JSON of values whose texts need not be UTF-8, such as the names of files."""

import msgspec


def encode_any(value: object) -> bytes:
    r"""Return a value as JSON; what is not UTF-8 in its texts is written as \udcff and the like, for people to read."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(_escape(msgspec.to_builtins(value, builtin_types=(msgspec.Raw,))))


def plain(text: str) -> str:
    """Return a text as a plain one: of a class of its own, as numpy's and markupsafe's texts are, it is in no JSON."""
    return str.__str__(text)


def _escape(value: object) -> object:
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {_escape(key): _escape(member) for key, member in value.items()}
        case list() | tuple():
            return [_escape(member) for member in value]
    return value
