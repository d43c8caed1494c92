"""Which process exactly: a pid alone names a slot in the kernel's table, not a process."""

import msgspec


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What it takes to say "this very process" after a restart; checkpointed with the status.

    The pidfd's inode number (Linux 6.9+) is unique while the machine is up and decides where it is known.
    Pid and start time alone are not proof: pids come around, and a start time is only exact to one tick.
    """

    pid: int
    """In the pid namespace named below."""
    start_ticks: int
    """Field 22 of /proc/PID/stat: clock ticks between boot and start (proc(5))."""
    boot_id: str
    """/proc/sys/kernel/random/boot_id: no process outlives its boot."""
    pidfd_inode: int
    """st_ino of the process's pidfd; 0 where the kernel has no pidfs (before 6.9)."""
    pid_namespace: int
    """Inode of /proc/self/ns/pid as the recorder saw it; a pid means nothing in another namespace."""


def has_sound_types(identity: ProcessIdentity) -> bool:
    """Return whether an identity from a damaged record can be looked at: SQLite keeps values of any type."""
    numbers = (identity.pid, identity.start_ticks, identity.pidfd_inode, identity.pid_namespace)
    return all(type(number) is int and number >= 0 for number in numbers) and 0 < identity.pid < 1 << 31
