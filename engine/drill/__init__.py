"""The drill: kill an engine at random instants, and compare what it says after recovery with what is true.

A child process opens an engine and lives by a plan drawn from a seed; the drill keeps the truth outside. Read
`plan` (what will happen), `life` (the child), `truth` and `world` (what the drill knows and sees), `judge` (the
comparison), then `rehearsal` (the rounds, in order) and `report`.
"""

from limpet.engine.drill.rehearsal import run_drill
from limpet.engine.drill.report import DrillReport, Failure

__all__ = ["DrillReport", "Failure", "run_drill"]
