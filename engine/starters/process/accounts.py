"""Users and groups by name and number: those of this host, or those of an image's root file system."""

import grp
import os
import pwd
import stat
from collections.abc import Iterator, Sequence

from limpet.engine.starters.process.keeper.root import open_in_root
from limpet.engine.starters.users import Account
from limpet.schema.errors import InvalidInputError
from limpet.schema.lengths import PATH_BYTES
from limpet.schema.protobuf_json import is_utf8

_MAX_BYTES = 4 << 20
"""Of /etc/passwd and of /etc/group in an image: some 50,000 users."""
_DIGITS = 20
"""Of a number that are read: no id has as many."""


class HostAccounts:
    """The users of this host, as its C library knows them (/etc/passwd, LDAP and others; see nsswitch.conf(5))."""

    def find_user(self, user: str | int) -> Account | None:
        """Return a user by name or number."""
        try:
            found = pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
        except (KeyError, ValueError, OverflowError):
            return None
        return Account(found.pw_name, found.pw_uid, found.pw_gid, found.pw_dir, found.pw_shell)

    def find_group(self, name: str) -> int | None:
        """Return a group's number by its name."""
        try:
            return grp.getgrnam(name).gr_gid
        except (KeyError, ValueError):
            return None

    def groups_of(self, account: Account) -> Sequence[int]:
        """Return the groups that name the user as a member."""
        return [gid for gid in os.getgrouplist(account.name, account.gid) if gid != account.gid]


class RootAccounts:
    """The users of a root file system, from its /etc/passwd and /etc/group. Nothing outside of it is read."""

    def __init__(self, root: str) -> None:
        self._root = root

    def find_user(self, user: str | int) -> Account | None:
        """Return a user by name or number. Raises InvalidInputError if /etc/passwd cannot be read."""
        for fields in self._read("etc/passwd", 7):
            if _is_number(fields[3]):
                home = fields[5] if _is_home(fields[5]) else "/"
                account = Account(fields[0], _to_number(fields[2]), _to_number(fields[3]), home, fields[6])
                if user in {account.name, account.uid}:
                    return account
        return None

    def find_group(self, name: str) -> int | None:
        """Return a group's number by its name. Raises InvalidInputError if /etc/group cannot be read."""
        return next((gid for found, gid, _ in self._groups() if found == name), None)

    def groups_of(self, account: Account) -> Sequence[int]:
        """Return the groups that name the user as a member. Raises InvalidInputError."""
        return [gid for _, gid, members in self._groups() if account.name in members and gid != account.gid]

    def _groups(self) -> Iterator[tuple[str, int, Sequence[str]]]:
        for fields in self._read("etc/group", 4):
            yield fields[0], _to_number(fields[2]), fields[3].split(",")

    def _read(self, path: str, count: int) -> Iterator[Sequence[str]]:
        """Yield the fields of each line that has at least `count`, the third of them a number.

        A line ends with a newline alone, as for everybody else who reads these files: a comment may hold the other
        characters that str.splitlines() takes for one.
        """
        text = read_in_root(self._root, path, _MAX_BYTES).decode("utf-8", "surrogateescape")
        for line in text.split("\n"):
            fields = line.strip().split(":")
            if len(fields) >= count and _is_number(fields[2]):
                yield fields


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _to_number(text: str) -> int:
    """Return a number, or one that is too large for an id as well: int() raises for thousands of digits."""
    return int(text.lstrip("0")[:_DIGITS] or "0")


def _is_home(text: str) -> bool:
    """Say whether HOME can be that: a path that config.json and an environment can hold."""
    return bool(text) and is_utf8(text) and "\0" not in text and len(text.encode()) <= PATH_BYTES


def read_in_root(root: str, path: str, max_bytes: int) -> bytes:
    """Return the content of a file in a root file system, found as a process in it would; b"" if there is none.

    Raises InvalidInputError if it is larger than `max_bytes`, not a regular file, or cannot be read.
    """
    try:
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = open_in_root(top, path.encode())
        finally:
            os.close(top)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise InvalidInputError(f"the image's /{path} is not a regular file")
            with open(f"/proc/self/fd/{found}", "rb") as file:
                content = file.read(max_bytes + 1)
        finally:
            os.close(found)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InvalidInputError(f"the image's /{path} cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise InvalidInputError(f"the image's /{path} is larger than {max_bytes} bytes")
    return content
