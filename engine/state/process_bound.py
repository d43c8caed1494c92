"""What belongs to the process that has made it: an engine, a store, and the handles of both."""

from typing import NoReturn, Self, SupportsIndex


class ProcessBound:
    """Is not pickled, as for a process of multiprocessing; a copy of it is itself, as of a lock's or a function's."""

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self

    def __reduce_ex__(self, _: SupportsIndex, /) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} belongs to this process and cannot be pickled: give the other process paths and"
            " ids; there, Snapshot.open looks on, and Engine.open or Store.open need a state directory of their own"
        )
