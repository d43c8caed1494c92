"""What `open` returns: it is awaited, or used in `async with` at once."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from limpet.engine.aio.answers import in_own_thread
from limpet.engine.state.process_bound import ProcessBound
from limpet.engine.state.turn import Attempt, open_in_parts_async


class Closing(ProcessBound, ABC):
    """What is open, and is closed at the end of an `async with` block."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @abstractmethod
    async def close(self) -> None:
        """Close it."""


class _Owned(Protocol):
    def close(self) -> None: ...


_T_co = TypeVar("_T_co", bound=Closing, covariant=True)
_Opened = TypeVar("_Opened", bound=_Owned)
_Front = TypeVar("_Front")


class Opening(Coroutine[Any, Any, _T_co]):
    """An opening to come: `await` it, or `async with` it, which closes what was opened at the end of the block."""

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, _T_co]]) -> None:
        self._begin = begin
        self._begun: Coroutine[Any, Any, _T_co] | None = None
        self._opened: Closing | None = None

    def __await__(self) -> Generator[Any, Any, _T_co]:
        return self._coroutine().__await__()

    async def __aenter__(self) -> _T_co:
        opened = await self._coroutine()
        self._opened = opened
        return opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._opened is not None:
            await self._opened.close()

    def send(self, value: Any) -> Any:
        """Go on; for asyncio, which takes it for a coroutine."""
        return self._coroutine().send(value)

    def throw(self, *args: Any) -> Any:
        """Go on with an error; for asyncio."""
        return self._coroutine().throw(*args)

    def close(self) -> None:
        """Give the opening up, where it has begun; for asyncio."""
        if self._begun is not None:
            self._begun.close()

    def _coroutine(self) -> Coroutine[Any, Any, _T_co]:
        if self._begun is None:
            self._begun = self._begin()
        return self._begun


async def open_whole(open_it: Callable[[float], _Opened], wait: float, front: Callable[[_Opened], _Front]) -> _Front:
    """Return the front of what `open_it` opens, given how long to wait for the lock; see `open_once`."""

    def attempt(part: float) -> Awaitable[_Front]:
        return open_once(lambda: open_it(part), in_own_thread, front)

    return await open_in_parts_async(attempt, wait)


async def open_once(
    open_it: Callable[[], _Opened],
    in_thread: Callable[[Callable[[], None]], Awaitable[None]],
    front: Callable[[_Opened], _Front],
) -> _Front:
    """Return what `front` makes of what `open_it` opens in a thread.

    What a task that is cancelled or interrupted does not get is closed, also if its front was being made.
    """
    attempt: Attempt[_Opened] = Attempt()
    try:
        await in_thread(lambda: attempt.run(open_it))
        return front(attempt.opened[0])
    except BaseException:
        try:
            attempt.discard()  # whoever waited is gone, and the thread may still be at it
        except BaseException:  # interrupted again, perhaps before it began
            attempt.discard()
            raise
        raise


def as_it_is(opened: _Opened) -> _Opened:
    """Return it: it needs no front."""
    return opened
