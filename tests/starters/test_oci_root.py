"""The runtime's own directory: one for each boot, whoever asks for it first."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from limpet.engine.starters.oci.root import RuntimeRoot

THREADS = 8


def test_those_who_come_first_at_once_get_the_same(tmp_path: Path) -> None:
    """The first containers of a state directory are started from many threads: each finds its own again."""
    with ThreadPoolExecutor(THREADS) as pool:
        for number in range(10):
            root = RuntimeRoot(str(tmp_path / str(number) / "runc"))
            barrier = threading.Barrier(THREADS)

            def make(root: RuntimeRoot = root, barrier: threading.Barrier = barrier) -> str:
                barrier.wait()
                return root.make()

            found = {task.result() for task in [pool.submit(make) for _ in range(THREADS)]}
            assert len(found) == 1
            assert os.listdir(root.above) == [os.path.basename(found.pop())]
