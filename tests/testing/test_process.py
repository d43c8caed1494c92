"""Processes that a check leaves behind are ended, whoever reaps some of them meanwhile."""

import subprocess
import sys

RACE = """
import os, threading, time
from limpet.testing.process import end_descendants, own_descendants

def reap():
    while not over.is_set():
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED)
        except ChildProcessError:
            time.sleep(0.0001)

own_descendants()
over = threading.Event()
for _ in range(20):
    for _ in range(20):
        if os.fork() == 0:
            time.sleep(1000)
    thread = threading.Thread(target=reap)
    thread.start()
    end_descendants()
    over.set()
    thread.join()
    over.clear()
print("ended", open(f"/proc/self/task/{os.getpid()}/children").read())
"""


def test_children_that_another_thread_reaps_are_ended() -> None:
    """As an engine's own thread does, where orphans come to its process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", RACE],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("ended \n", "")
