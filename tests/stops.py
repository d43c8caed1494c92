"""Processes that a signal stops: it is sent at once, and takes effect a moment later on a busy machine."""

import os
import signal
from pathlib import Path

from tests.conftest import wait_until


def stop_by_signal(*pids: int) -> None:
    """Send SIGSTOP to one after the other, and wait until each is stopped: its parent may have it go on soon after."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda pid=pid: has_taken_stop(pid), "it to stop")  # type: ignore[misc] # bound at once


def has_taken_stop(pid: int) -> bool:
    """Say whether a process is stopped, or was, and goes on: a SIGSTOP that was sent to it is not pending any more."""
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        read_state(pid) == "T" or not int(status.partition("\nShdPnd:")[2].split()[0], 16) >> (signal.SIGSTOP - 1) & 1
    )


def read_state(pid: int) -> str:
    """Return the letter by which proc(5) tells what a process does."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
