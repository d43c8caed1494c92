"""What a host program may do to children that it does not know of."""

import os
import threading
import time


def reap_any(over: threading.Event) -> None:
    """Wait for any child of this process, whoever has begun it, until it is over."""
    while not over.is_set():
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.0005)
