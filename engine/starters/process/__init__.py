"""The process starter: a container is a process of this host and all that descends from it. It does not isolate.

Read `starter` (what the engine calls), `spec` (what is to be run), `client` (how it speaks to the keeper), then
`keeper`, which starts the processes and sees how they end.
"""

from limpet.engine.starters.process.facts import find_facts, output_seen
from limpet.engine.starters.process.starter import ProcessStarter, make_starter

__all__ = ["ProcessStarter", "find_facts", "make_starter", "output_seen"]
