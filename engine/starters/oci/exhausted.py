"""What has run out, and where its limit is, where a runtime fails with words that mean a disk."""

import os
import re
from contextlib import suppress

_KEYS = re.compile(r"\b(session key|keyring)\b.*quota exceeded", re.IGNORECASE)
_NAMESPACES = re.compile(r"\b(unshare|clone|nsexec)\b.*no space left on device", re.IGNORECASE)
_PROCESSES = re.compile(
    r"\b(spawn|fork|clone|thread|pthread_create)\b.*(resource temporarily unavailable|errno=11)", re.IGNORECASE
)


def name_exhausted(problem: str) -> str:
    """Return what a runtime says is wrong, with what to do if something has run out that it does not name."""
    if _KEYS.search(problem):
        return f"{problem}: no more keys, of which each container needs one; {_describe_keys()}"
    if _NAMESPACES.search(problem):
        return (
            f"{problem}: no more namespaces; raise their limits, /proc/sys/user/max_*_namespaces, or that of mounts,"
            " /proc/sys/fs/mount-max, or have fewer; pid and user namespaces can be 32 deep"
        )
    if _PROCESSES.search(problem):
        return (
            f"{problem}: no more processes; raise the limit of this user (ulimit -u), of a cgroup above (pids.max), or"
            " /proc/sys/kernel/threads-max or pid_max, or have fewer"
        )
    return problem


def _describe_keys() -> str:
    """Say how many keys this user has and may have (keyrings(7)), and where that is set."""
    user = os.geteuid()
    prefix = "root_" if user == 0 else ""
    has = ""
    with suppress(OSError, IndexError), open("/proc/key-users", encoding="ascii") as file:
        fields = next((line.split() for line in file if line.split()[0] == f"{user}:"), [])
        keys, size = (each.replace("/", " of ") for each in fields[3:5]) if fields else ("", "")
        has = f"user {user} has {keys} keys, and {size} bytes of them; " if keys else ""
    where = "/proc/sys/kernel/keys/"
    return f"{has}raise {where}{prefix}maxkeys and {where}{prefix}maxbytes, or have fewer containers"
