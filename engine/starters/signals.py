"""Signals that have stopped a process."""

import signal

from limpet.recovery.host import read_stat


def let_go_on(pid: int, pidfd: int) -> bool:
    """Continue the process behind a pidfd if a signal has stopped it; return whether one had. Raises OSError."""
    if read_stat(pid)[0] != b"T":  # proc(5): stopped on a signal
        return False
    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    return True
