"""Makes functions slow at random, to hit what takes microseconds; keepers too, so by the standard library alone."""

import random
import time
from typing import Any

_LATEST_SECONDS = 0.03


def slow_down(owner: Any, name: str, share: float) -> None:
    """Have that share of the calls of `owner.name` begin late, and that share end late."""
    real = getattr(owner, name)
    by_chance = random.SystemRandom()

    def late(*given: Any, **named: Any) -> Any:
        if by_chance.random() < share:
            time.sleep(by_chance.random() * _LATEST_SECONDS)
        result = real(*given, **named)
        if by_chance.random() < share:
            time.sleep(by_chance.random() * _LATEST_SECONDS)
        return result

    setattr(owner, name, late)
