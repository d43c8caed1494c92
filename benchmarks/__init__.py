"""The benchmark: limpet on this machine's disk, compared with alternatives. `limpet bench` runs it.

Read `experiments` (what is measured, as a table), `goals` (the targets), `contenders` and `databases` (what is
compared), then `checkpoints`, `openings` and `liveness` (how it is measured), `run` and `worker` (the order; each cell
in a separate process). `figures` is the JSON document.
"""

from limpet.benchmarks.figures import BenchReport
from limpet.benchmarks.run import Progress, Settings, run_bench

__all__ = ["BenchReport", "Progress", "Settings", "run_bench"]
