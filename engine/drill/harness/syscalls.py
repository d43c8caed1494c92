"""The system calls that change files, their numbers, and the seccomp filter that stops a process at each.

Numbers are those of the kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64). Calls that could change
a file unseen (a shared mapping, io_uring, a clone ioctl, a call of a 32-bit program) are stopped too, so that the
supervisor can report them instead of missing them.
"""

import os
import platform
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

AUDIT_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of the architectures that have a column in CALLS."""

SECCOMP_NUMBERS: Final = {"x86_64": 317, "aarch64": 277}
PIDFD_GETFD: Final = 438
RENAMEAT2_NUMBERS: Final = {"x86_64": 316, "aarch64": 276}

FOREIGN: Final = "32-bit system call"
"""The name for a call that is not of the native architecture: its number means something else."""

CALLS: Final[dict[str, tuple[int | None, int | None]]] = {
    # name              x86_64  aarch64
    "write":             (1,      64),
    "pwrite64":          (18,     68),
    "writev":            (20,     66),
    "pwritev":           (296,    70),
    "pwritev2":          (328,    287),
    "truncate":          (76,     45),
    "ftruncate":         (77,     46),
    "fallocate":         (285,    47),
    "fsync":             (74,     82),
    "fdatasync":         (75,     83),
    "sync":              (162,    81),
    "syncfs":            (306,    267),
    "open":              (2,      None),
    "creat":             (85,     None),
    "openat":            (257,    56),
    "openat2":           (437,    437),
    "open_by_handle_at": (304,    265),
    "mkdir":             (83,     None),
    "mkdirat":           (258,    34),
    "rmdir":             (84,     None),
    "unlink":            (87,     None),
    "unlinkat":          (263,    35),
    "rename":            (82,     None),
    "renameat":          (264,    38),
    "renameat2":         (316,    276),
    "link":              (86,     None),
    "linkat":            (265,    37),
    "symlink":           (88,     None),
    "symlinkat":         (266,    36),
    "mknod":             (133,    None),
    "mknodat":           (259,    33),
    "chmod":             (90,     None),
    "fchmod":            (91,     52),
    "fchmodat":          (268,    53),
    "fchmodat2":         (452,    452),
    "setxattr":          (188,    5),
    "lsetxattr":         (189,    6),
    "fsetxattr":         (190,    7),
    "removexattr":       (197,    14),
    "lremovexattr":      (198,    15),
    "fremovexattr":      (199,    16),
    "mmap":              (9,      222),
    "mprotect":          (10,     226),
    "sendfile":          (40,     71),
    "splice":            (275,    76),
    "copy_file_range":   (326,    285),
    "ioctl":             (16,     29),
    "io_setup":          (206,    0),
    "io_uring_setup":    (425,    425),
}  # fmt: skip

_O_TMPFILE_BIT: Final = 0o20000000
_MAP_SHARED, _MAP_ANONYMOUS, _PROT_WRITE = 0x01, 0x20, 0x2
_CLONE_IOCTLS: Final = (0x40049409, 0x4020940D, 0xC0189436)  # FICLONE, FICLONERANGE, FIDEDUPERANGE


class Condition(NamedTuple):
    """Stop only if this holds for one argument: bits of `any_of` set, none of `none_of`, or equal."""

    argument: int
    any_of: int = 0
    none_of: int = 0
    equal: tuple[int, ...] = ()


CONDITIONS: Final = {
    "open": Condition(1, any_of=os.O_CREAT | os.O_TRUNC | _O_TMPFILE_BIT),
    "openat": Condition(2, any_of=os.O_CREAT | os.O_TRUNC | _O_TMPFILE_BIT),
    "mmap": Condition(3, any_of=_MAP_SHARED, none_of=_MAP_ANONYMOUS),
    "mprotect": Condition(2, any_of=_PROT_WRITE),
    "ioctl": Condition(1, equal=_CLONE_IOCTLS),
}
"""Frequent calls that change a file only with these arguments."""

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF, linux/filter.h
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000  # SECCOMP_RET_USER_NOTIF, SECCOMP_RET_ALLOW
_X32_BIT: Final = 0x40000000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # struct seccomp_data

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def machine() -> str:
    """Return this machine's architecture by its name in the tables."""
    return platform.machine()


Table = Mapping[str, tuple[int | None, int | None]]
"""Calls by name, each with its number in the columns of CALLS."""


class Stops(NamedTuple):
    """Where a process is stopped: at the calls of a table, of which those with a condition only where that holds."""

    table: Table
    conditions: Mapping[str, Condition]

    def of(self, *names: str) -> "Stops":
        """Return only these calls of it: a process is faster that is stopped at fewer."""
        return Stops({name: self.table[name] for name in names}, self.conditions)

    def numbers(self, architecture: str) -> dict[str, int]:
        """Return the name and number of every call that is stopped on `architecture`."""
        column = list(AUDIT_ARCHITECTURES).index(architecture)
        return {name: row[column] for name, row in self.table.items() if row[column] is not None}  # type: ignore[misc] # mypy does not narrow row[column]


FILE_CHANGES: Final = Stops(CALLS, CONDITIONS)


def filter_program(architecture: str, stops: Stops = FILE_CHANGES) -> bytes:
    """Return the BPF program (an array of struct sock_filter) that stops a process at each of these calls."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURES[architecture]),
        (_RETURN, 0, 0, _NOTIFY),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _NOTIFY),
    ]
    for name, number in stops.numbers(architecture).items():
        block = _conditional(stops.conditions[name]) if name in stops.conditions else [(_RETURN, 0, 0, _NOTIFY)]
        program += [(_JUMP_EQUAL, 0, len(block), number), *block]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _conditional(condition: Condition) -> list[Instruction]:
    """Return a block that ends in NOTIFY if the condition holds, otherwise in ALLOW."""
    load: Instruction = (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * condition.argument)  # low word: little-endian
    if condition.equal:
        last = len(condition.equal) - 1
        tests: list[Instruction] = [(_JUMP_EQUAL, last - i + 1, 0, value) for i, value in enumerate(condition.equal)]
        return [load, *tests, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _NOTIFY)]
    return [
        load,
        (_JUMP_BITS, 0, 2, condition.any_of),
        (_JUMP_BITS, 1, 0, condition.none_of),
        (_RETURN, 0, 0, _NOTIFY),
        (_RETURN, 0, 0, _ALLOW),
    ]
