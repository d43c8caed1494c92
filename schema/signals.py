"""Signals, and their names: the CRI's, those of images (Linux), and numbers, each for one signal.

Real-time signals are counted from 34 to 64, as glibc, the CRI and Docker count them.
"""

import re
import signal

from limpet.schema.cri import Signal as CriSignal
from limpet.schema.errors import InvalidInputError, quote

_RTMIN, _RTMAX = 34, 64
_LAST_FROM_RTMIN = 15
"""SIGRTMIN+15 is followed by SIGRTMAX-14, in the CRI and in kill(1)."""
_REAL_TIME = re.compile(r"SIGRT(?:MIN(?:(?:\+|PLUS)(\d{1,2}))?|MAX(?:(?:-|MINUS)(\d{1,2}))?)", re.ASCII)


def number_of_signal(name: str) -> int:
    """Return a signal's number on Linux: SIGTERM, TERM, SIGRTMIN+3, SIGRTMINPLUS3 and "37" are understood.

    Raises InvalidInputError for anything else.
    """
    text = name.upper()
    full = text if text.startswith("SIG") else f"SIG{text}"
    if text.isascii() and text.isdigit() and len(text) <= 2:
        number = int(text)
    elif full in signal.Signals.__members__ and not full.startswith("SIGRT"):
        number = signal.Signals[full]
    elif found := _REAL_TIME.fullmatch(full):
        plus, minus = (int(each or 0) for each in found.groups())
        number = _RTMAX - minus if full.startswith("SIGRTMAX") else _RTMIN + plus
        number = number if _RTMIN <= number <= _RTMAX else 0
    else:
        number = 0
    if not (0 < number < 32 or _RTMIN <= number <= _RTMAX):
        raise InvalidInputError(f"stop signal {quote(name)}: give a signal's name, such as SIGTERM, or its number")
    return int(number)


def name_of_signal(number: int) -> str:
    """Return a signal's one name: SIGTERM, or for a real-time signal SIGRTMIN+3 or SIGRTMAX-3."""
    if number < _RTMIN:
        return signal.Signals(number).name
    if number <= _RTMIN + _LAST_FROM_RTMIN:
        return f"SIGRTMIN+{number - _RTMIN}".removesuffix("+0")
    return f"SIGRTMAX-{_RTMAX - number}".removesuffix("-0")


def to_cri_signal(name: str) -> CriSignal:
    """Return a signal as the CRI names it; RUNTIME_DEFAULT for a name that is none."""
    try:
        canonical = name_of_signal(number_of_signal(name))
    except InvalidInputError:
        return CriSignal.RUNTIME_DEFAULT
    return CriSignal(canonical.replace("+", "PLUS").replace("-", "MINUS"))
