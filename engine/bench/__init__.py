"""The benchmark: durable checkpoints and recovery on this machine's disk, beside what else one might use.

Read `contenders` (what is compared), `checkpoints` (how calls are timed), `openings` (how recovery is), then `run`.
"""

from limpet.engine.bench.run import BenchReport, run_bench

__all__ = ["BenchReport", "run_bench"]
