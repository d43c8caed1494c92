"""How a command reaches a live engine: a private socket in the state directory; a request or session a connection.

Read `messages` (what is said), `requests` (what can be asked, and what an engine then does), `server` and `client`;
then `frames` and `streams`, for sessions with programs in containers.
"""

from limpet.engine.control.client import NoEngineError, ask_live, find_pid, open_live
from limpet.engine.control.requests import perform
from limpet.engine.control.server import ControlServer

__all__ = ["ControlServer", "NoEngineError", "ask_live", "find_pid", "open_live", "perform"]
