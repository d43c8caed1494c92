"""The process starter: a container is a process group on this host. It does not isolate.

Read `starter` (what the engine calls), `spec` (what is to be run), `gate` (what a process is before its program).
"""

from limpet.engine.starters.process.starter import ProcessStarter, make_starter

__all__ = ["ProcessStarter", "make_starter"]
