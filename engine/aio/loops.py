"""The event loop that a task runs in."""

import asyncio

from limpet.schema.errors import UnsupportedError


def require_loop() -> asyncio.AbstractEventLoop:
    """Return asyncio's loop that runs. Raises UnsupportedError where none does, as under trio."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError as error:
        raise UnsupportedError(
            "no event loop of asyncio runs here, and this needs one: call it in asyncio.run(...); under another loop,"
            " such as trio's, use Engine or Store in threads"
        ) from error
