"""Calls that fail for want of memory, so that what comes of it can be seen at each of them."""

from collections.abc import Callable, Container
from typing import Any


class Failing:
    """Counts the calls of all that it was given; those with these numbers fail, before anything is done, or after."""

    def __init__(self, at: Container[int], *, is_after: bool = False) -> None:
        self._at = at
        self._is_after = is_after
        self.calls = 0

    def __call__(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return what does the same as `real`, and fails in its turn."""

        def call(*args: Any) -> Any:
            self.calls += 1
            fails = self.calls in self._at
            if fails and not self._is_after:
                raise MemoryError
            result = real(*args)
            if fails:
                raise MemoryError
            return result

        return call
