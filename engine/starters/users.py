"""Who a container's program runs as: chosen by its config and its image, looked up in the image's own /etc/passwd."""

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from limpet.recovery.pid_namespaces import FIRST_USER_NAMESPACE
from limpet.schema.cri import ContainerConfig, LinuxContainerSecurityContext, SupplementalGroupsPolicy
from limpet.schema.errors import InvalidInputError, quote
from limpet.schema.image import ImageConfig
from limpet.schema.runtime_spec import User

_MAX_ID = 2**32 - 2
"""The kernel takes 2**32 - 1 for "unchanged": who asked for it would stay root."""
_MOST_GROUPS = 65_536
"""NGROUPS_MAX; with more runc hangs."""
_CAP_SETGID, _CAP_SETUID = 6, 7
_CAPABILITY_VERSION = 0x20080522
"""Of capget(2): two words of capabilities, each effective, permitted, inheritable."""
_ALL_IDS = (range(_MAX_ID + 1),)
_libc = ctypes.CDLL(None, use_errno=True)


class Account(NamedTuple):
    """A user as /etc/passwd describes it."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str


class Accounts(Protocol):
    """Where users and groups are looked up."""

    def find_user(self, user: str | int) -> Account | None:
        """Return a user by name or number."""

    def find_group(self, name: str) -> int | None:
        """Return a group's number by its name."""

    def groups_of(self, account: Account) -> Sequence[int]:
        """Return the groups that name the user as a member."""


@dataclass(frozen=True)
class RootRights:
    """What root may do about users: not each kind of it may do all."""

    sets_groups: bool = True
    """Whether it may set supplementary groups."""
    uids: Sequence[range] = _ALL_IDS
    """Which users it may become."""
    gids: Sequence[range] = _ALL_IDS

    @classmethod
    def of_this_process(cls) -> "RootRights":
        """Return what this process may do, which is root's. Raises OSError."""
        gid = os.getegid()
        uids = _read_ids("uid_map") if has_capability(_CAP_SETUID) else (range(1),)
        gids = _read_ids("gid_map") if has_capability(_CAP_SETGID) else (range(gid, gid + 1),)
        return cls(may_set_groups(), uids, gids)


@dataclass(frozen=True)
class Rights:
    """What this process may do about users."""

    uid: int
    gid: int
    groups: Sequence[int]
    has_own_ids: bool
    """True if the container has a root of its own, where an ordinary user is whoever it says, in a user namespace."""
    of_root: Callable[[], RootRights] = RootRights
    """Asked of root alone, and only if another user or a group is asked for."""

    @classmethod
    def of_this_process(cls, *, has_own_root: bool) -> "Rights":
        """Return what this process may do, for a container with or without a root of its own."""
        return cls(os.geteuid(), os.getegid(), os.getgroups(), has_own_root, RootRights.of_this_process)


def may_set_groups() -> bool:
    """Say whether this process may set supplementary groups: as root, unless its user namespace denies that."""
    if os.geteuid() != 0 or not has_capability(_CAP_SETGID):
        return False
    with open("/proc/self/setgroups", encoding="utf-8") as file:  # user_namespaces(7)
        return file.read().strip() != "deny"


def is_in_user_namespace() -> bool:
    """Say whether this process's user namespace is not the machine's own: its root's rights count in there alone."""
    try:
        return os.stat("/proc/self/ns/user").st_ino != FIRST_USER_NAMESPACE
    except OSError:  # a kernel without them
        return False


def has_capability(number: int) -> bool:
    """Say whether this thread has a capability in effect."""
    header, found = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    word, bit = divmod(number, 32)
    return not _libc.capget(header, found) and bool(found[3 * word] >> bit & 1)


def _read_ids(name: str) -> tuple[range, ...]:
    """Return the ids that there are in this process's user namespace: all of them in the machine's own."""
    with open(f"/proc/self/{name}", encoding="utf-8") as file:
        lines = [[int(number) for number in line.split()] for line in file]
    return tuple(range(first, first + count) for first, _, count in lines)


@dataclass(frozen=True)
class _Asked:
    """A user and a group by name or number, and the names of the fields that gave them."""

    user: str | int | None
    group: str | int | None
    user_field: str
    group_field: str


def choose_user(
    image: ImageConfig, config: ContainerConfig, accounts: Accounts, rights: Rights
) -> tuple[User, Account | None]:
    """Return who the program runs as, and that user's entry in /etc/passwd; None for one that has none.

    The config's run_as_user or run_as_username, else the image's `user[:group]`, else root in a root of its own and
    the engine's own user on the host. A group that is not given is the user's in /etc/passwd; without an entry 0 in a
    root of its own (as containerd and Docker do), and on the host, where 0 is a privilege, the user's number.
    Supplementary groups are that group, those of the config, and with policy Merge those in which /etc/group has the
    user.

    Raises InvalidInputError, naming the field, for an unknown name, a number out of range, and what this process has
    no right to.
    """
    context = (config.linux and config.linux.security_context) or LinuxContainerSecurityContext()
    asked = _read_asked(image, context)
    user = 0 if asked.user is None and rights.has_own_ids else asked.user
    extra = tuple(_require_id("supplemental_groups", each) for each in context.supplemental_groups)
    is_anything_asked = user is not None or bool(extra)
    root = rights.of_root() if rights.uid == 0 and is_anything_asked else RootRights()
    if user is None:
        account = accounts.find_user(rights.uid)
        result = User(additional_gids=extra)
    else:
        account = accounts.find_user(user)
        if account is None and isinstance(user, str):
            raise InvalidInputError(f"{asked.user_field} {quote(user)}: /etc/passwd has no such user; give its number")
        uid = _require_id(asked.user_field, account.uid if account else user)
        gid = _find_gid(asked, accounts)
        if gid is None:
            own = account.gid if account else 0 if rights.has_own_ids else uid
            gid = _require_id(f"{asked.user_field} {uid}: group", own)
        merged = list(extra)
        if rights.uid == 0 and root.sets_groups:
            # A program could give up the group, and what is forbidden to it, if it had that as its own alone.
            merged = [gid, *extra]
            if account and context.supplemental_groups_policy is SupplementalGroupsPolicy.MERGE:
                merged += [_require_id("/etc/group: group", each) for each in accounts.groups_of(account)]
        result = User(uid=uid, gid=gid, additional_gids=tuple(dict.fromkeys(merged)))
    if (count := len(result.additional_gids)) > _MOST_GROUPS:
        raise InvalidInputError(
            f"supplemental_groups: {count:,} with those of /etc/group; a process can have {_MOST_GROUPS:,}"
        )
    _require_rights(result, extra, asked, rights, root)
    return result, account


def _read_asked(image: ImageConfig, context: LinuxContainerSecurityContext) -> _Asked:
    if context.run_as_user is not None and context.run_as_username:
        raise InvalidInputError("run_as_user and run_as_username: give one of them")
    group = context.run_as_group.value if context.run_as_group else None
    if context.run_as_user is not None:
        return _Asked(context.run_as_user.value, group, "run_as_user", "run_as_group")
    if context.run_as_username:
        return _Asked(_number_or_name(context.run_as_username), group, "run_as_username", "run_as_group")
    if group is not None:
        raise InvalidInputError(f"run_as_group {group}: give run_as_user or run_as_username, too (so does the CRI ask)")
    user, _, image_group = image.user.partition(":")
    return _Asked(_number_or_name(user), _number_or_name(image_group), "image user", "image group")


def _number_or_name(text: str) -> str | int | None:
    if not text:
        return None
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def _find_gid(asked: _Asked, accounts: Accounts) -> int | None:
    if not isinstance(asked.group, str):
        return asked.group if asked.group is None else _require_id(asked.group_field, asked.group)
    gid = accounts.find_group(asked.group)
    if gid is None:
        raise InvalidInputError(f"{asked.group_field} {quote(asked.group)}: /etc/group has no such group")
    return _require_id(asked.group_field, gid)


def _require_id(field: str, value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= _MAX_ID:
        raise InvalidInputError(f"{field} {value}: a number from 0 to {_MAX_ID} is needed")
    return value


def _require_rights(user: User, extra: Sequence[int], asked: _Asked, rights: Rights, root: RootRights) -> None:
    """Refuse what this process may not do: all but itself for an ordinary user, and what some kinds of root may not."""
    if rights.uid == 0:
        group_field = f"{asked.user_field} {user.uid}: group" if asked.group is None else asked.group_field
        for field, value, ids in (
            (asked.user_field, user.uid, root.uids),
            (group_field, user.gid, root.gids),
            *(("supplemental_groups", each, root.gids) for each in user.additional_gids),
        ):
            if value is not None and not any(value in each for each in ids):
                raise InvalidInputError(
                    f"{field} {value}: this process may not become that; it takes CAP_SETUID and CAP_SETGID, and a"
                    " place in its user namespace (/proc/self/uid_map, gid_map)"
                )
        missing = set() if root.sets_groups else set(extra) - {rights.gid, *rights.groups}
        if missing:
            raise InvalidInputError(
                f"supplemental_groups {sorted(missing)}: this process may set none; it takes CAP_SETGID, and a user"
                " namespace that allows it (/proc/self/setgroups)"
            )
        return
    if not rights.has_own_ids and user.uid not in {None, rights.uid}:
        raise InvalidInputError(f"{asked.user_field} {user.uid}: user {rights.uid} may become nobody else; run as root")
    if not rights.has_own_ids and user.gid not in {None, rights.gid}:
        raise InvalidInputError(
            f"{asked.group_field} {user.gid}: user {rights.uid} has group {rights.gid}; run as root"
        )
    missing = set(extra) if rights.has_own_ids else set(extra) - {rights.gid, *rights.groups}
    if missing:
        raise InvalidInputError(f"supplemental_groups {sorted(missing)}: user {rights.uid} may not take them")
