"""With which fleet a state directory is opened, if with any: values only, and no driver."""

from typing import NamedTuple

FLEET_TIMEOUT_SECONDS = 10.0


class FleetChoice(NamedTuple):
    """What `Store.open` is told of a fleet."""

    url: str = ""
    ack: str = "async"
    timeout: float = FLEET_TIMEOUT_SECONDS
