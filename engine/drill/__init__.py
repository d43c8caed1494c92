"""The drill: kill an engine at random moments, and compare what it reports after recovery with the truth.

A child process opens an engine and follows a plan drawn from a seed; the drill records the truth outside it. Read
`plan` (what will happen), `life` (the child), `truth` and `world` (what the drill knows and sees), `judge` (the
comparison), then `rehearsal` (the rounds, in order), `diary` (what happens in them) and `report`.
"""

from limpet.engine.drill.diary import Happened, Happening
from limpet.engine.drill.rehearsal import run_drill
from limpet.engine.drill.report import DrillReport, Failure

__all__ = ["DrillReport", "Failure", "Happened", "Happening", "run_drill"]
