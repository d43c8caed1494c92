"""The benchmark: limpet on this machine's disk, beside what else one might use. What runs is `limpet bench`.

Read `experiments` (what is measured, as a table), `goals` (what is to come of it), `contenders` and `databases` (who
takes part), then `checkpoints`, `openings` and `liveness` (how it is measured), `run` and `worker` (in what order, each
in a process of its own). `figures` is the JSON document.
"""

from limpet.benchmarks.figures import BenchReport
from limpet.benchmarks.run import Progress, Settings, run_bench

__all__ = ["BenchReport", "Progress", "Settings", "run_bench"]
