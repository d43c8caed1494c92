"""How a command reaches a live engine: a private socket in the state directory, one request for each connection.

Read `messages` (what is said), `requests` (what can be asked, and what an engine then does), `server` and `client`.
"""

from limpet.engine.control.client import NoEngineError, ask_live
from limpet.engine.control.requests import perform
from limpet.engine.control.server import ControlServer

__all__ = ["ControlServer", "NoEngineError", "ask_live", "perform"]
