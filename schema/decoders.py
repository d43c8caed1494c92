"""Decoders of JSON: made where a module is imported, one at a time.

msgspec describes a class to itself when it is first to decode one. Another thread that decodes one meanwhile takes
what is half described for the whole: it misses fields, or ends the process with SIGSEGV.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar, overload

import msgspec

_Kind = TypeVar("_Kind")
_Kind_co = TypeVar("_Kind_co", covariant=True)
_making = threading.RLock()  # two threads may import two modules whose classes share a third one


class Decoder(Protocol[_Kind_co]):
    """Decodes JSON into what it was made for, for any number of threads at once."""

    def decode(self, data: bytes | bytearray | str, /) -> _Kind_co:
        """Return what is in `data`. Raises msgspec.MsgspecError, UnicodeDecodeError, RecursionError."""


@overload
def make_decoder(kind: type[_Kind]) -> Decoder[_Kind]: ...
@overload
def make_decoder(kind: Any) -> Decoder[Any]: ...
def make_decoder(kind: Any) -> Decoder[Any]:
    """Return what decodes JSON into `kind`."""
    with _making:
        return msgspec.json.Decoder(kind)  # noqa: TID251  # made here, and nowhere else


def make_converter(kind: type[_Kind]) -> Callable[[object], _Kind]:
    """Return what makes a `kind` of the dicts, lists and so on of JSON; it raises msgspec.ValidationError."""
    make_decoder(kind)
    return partial(msgspec.convert, type=kind)  # noqa: TID251  # it is described by now


decode_any = make_decoder(Any).decode
"""Decodes JSON into dict, list, str, int, float, bool and None."""
