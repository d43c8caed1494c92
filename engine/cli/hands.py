"""The hands of the verbs that change something: the live engine, or one that is opened here while none lives."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from limpet.engine.cli.exits import exit_status
from limpet.engine.cli.options import Place
from limpet.engine.cli.output import note
from limpet.engine.cli.wording import tell_error
from limpet.engine.control import NoEngineError, ask_live, open_live, perform
from limpet.engine.control.requests import (
    AnyStream,
    Done,
    Execute,
    Info,
    Recover,
    Removal,
    Remove,
    Request,
    Wait,
    open_session,
    tell_done,
)
from limpet.engine.engine import Engine
from limpet.engine.inspection.snapshot import Snapshot, View, require_state
from limpet.engine.lifecycle.deleted import find_last_status
from limpet.engine.starters import Starter
from limpet.engine.starters.abilities import Session
from limpet.engine.state.directory import check_directory
from limpet.engine.state.entries import resolve_directory
from limpet.engine.state.names import DATABASE, OCI
from limpet.recovery.evidence import Process
from limpet.recovery.host import observe_process
from limpet.schema.errors import (
    ClosedError,
    EngineGoneError,
    InvalidInputError,
    LimpetError,
    NotFoundError,
    StateDirectoryLockedError,
    WaitTimeoutError,
    quote,
)
from limpet.schema.status import ContainerState

_T = TypeVar("_T")
_PATIENCE_SECONDS = 3.0
"""How long to try while an engine that is there takes no requests: one is just being opened, or closed."""
_AGAIN_SECONDS = 0.05
_BRIEFLY_SECONDS = 1.0
"""How long an engine that is open here is kept for an end that may come soon."""
_LOOK_SECONDS, _KNOCK_SECONDS = 0.1, 1.0
"""Between two looks at a process, and at whether an engine lives."""
_MOST_AT_ONCE = 16
RUNTIMES = frozenset({"runc", "crun"})
"""The runtime handlers of engines that commands open; a program's own engine may have others."""


class _Patience:
    """How long what is in the way is borne. It begins anew whenever something was achieved."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._latest = time.monotonic() + _PATIENCE_SECONDS

    def is_over(self) -> bool:
        return time.monotonic() > self._latest


class Hands:
    """Does what is asked. Thread-safe. With `makes`, a state directory that is missing is made.

    An engine that is opened here has the OCI runtimes that were used in it, and `runtime`.
    """

    def __init__(self, place: Place, *, makes: bool = False, runtime: str = "") -> None:
        self._place = place
        self._runtime = runtime
        self.state_dir = _require_usable(place.state_dir) if makes else require_state(place.state_dir)
        self._is_there = os.path.lexists(os.path.join(self.state_dir, DATABASE))
        self._opening = threading.Lock()
        self._engine: Engine | None = None
        self._seen: dict[str, View] = {}
        """How containers that are waited for were seen last, by what they were called."""
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._opening:
            self._is_closed = True
            if self._engine is not None:
                self._engine.close()

    def ask(self, request: Request) -> Any:
        """Have it done, and return the result, of the type that the request's `RESULT` names.

        An engine that ends before it has answered is followed by the next, or by one that is opened here. Raises what
        the engine raises, StateDirectoryLockedError if a program has the state open that takes no requests, and
        EngineGoneError if engines keep ending, or one hangs.
        """
        patience = _Patience()
        was_asked = False
        while True:
            problem: LimpetError
            begun = time.monotonic()
            try:
                return self._ask_once(request, patience)
            except NotFoundError:
                if was_asked and isinstance(request, Remove):  # the engine that ended had done it
                    require_state(self.state_dir)
                    return (Removal(kind="container", id=request.id, name=""),)
                raise
            except StateDirectoryLockedError as error:
                problem = StateDirectoryLockedError(
                    f"{error}. It takes no commands: it is an older limpet, or a program with a store of its own",
                    error.holder_pid,
                )
            except (EngineGoneError, ClosedError) as error:
                if getattr(error, "may_live", False):
                    raise
                problem, was_asked = error, True
            if time.monotonic() - begun > _PATIENCE_SECONDS:  # it had worked, or waited, for long
                patience.renew()
            if self._is_closed or patience.is_over():
                raise problem
            time.sleep(_AGAIN_SECONDS)

    def open_session(self, request: AnyStream) -> Session:
        """Open a session with a program in a container, and return it. Raises as `ask` does.

        A command that an engine may have begun before it ended is not begun once more.
        """
        patience = _Patience()
        while True:
            try:
                try:
                    return open_live(self.state_dir, request, node=self._place.node)
                except NoEngineError:
                    return open_session(self._open()[0], request)
            except (StateDirectoryLockedError, EngineGoneError) as error:
                may_have_begun = isinstance(error, EngineGoneError) and isinstance(request, Execute)
                if may_have_begun or patience.is_over():
                    raise
                time.sleep(_AGAIN_SECONDS)

    def _ask_once(self, request: Request, patience: _Patience) -> Any:
        if isinstance(request, Wait):
            return self._wait(request, patience)
        if self._engine is not None:
            return perform(self._engine, request)
        try:
            return ask_live(self.state_dir, request, node=self._place.node)
        except NoEngineError:
            engine, is_new = self._open()
        return engine.recovery if is_new and isinstance(request, Recover) else perform(engine, request)

    def _wait(self, request: Wait, patience: _Patience) -> Any:
        """Wait without keeping others from opening an engine: one is opened here for a moment, to take down the end."""
        if self._engine is not None:
            container = self._engine.get(request.id)
            try:
                return tell_done(container, container.wait(_BRIEFLY_SECONDS))
            except WaitTimeoutError:
                self._let_go()
        try:
            return self._wait_for(request.id, patience)
        except NotFoundError:
            if request.id not in self._seen:
                raise
            return self._tell_deleted(self._seen[request.id])

    def _wait_for(self, text: str, patience: _Patience) -> Any:
        """Wait for a container, whichever engines come and go. Raises NotFoundError if it is not there any more.

        Engines may come and go for as long as it runs: patience is for what is in the way once it has ended.
        """
        while True:
            key = self._seen[text].id if text in self._seen else text
            try:
                return ask_live(self.state_dir, Wait(id=key), node=self._place.node)
            except (NoEngineError, EngineGoneError, ClosedError) as error:
                if getattr(error, "may_live", False):
                    raise
            view = self._seen[text] = self._look(key)
            if view.status.state is ContainerState.EXITED:
                return Done(id=view.id, name=view.name, status=view.status)
            if self._watch_until_ended(view, patience):
                return perform(self._open()[0], Wait(id=view.id))
            time.sleep(_AGAIN_SECONDS)  # the engine that lives may be about to close

    def _look(self, text: str) -> View:
        with Snapshot.open(self.state_dir, node=self._place.node) as snapshot:
            return snapshot.get(text)

    def _tell_deleted(self, seen: View) -> Done:
        """Tell how a container has ended that another command has deleted meanwhile. Raises NotFoundError."""
        with Snapshot.open(self.state_dir, node=self._place.node) as snapshot:
            return Done(id=seen.id, name=seen.name, status=find_last_status(snapshot, seen.id, seen.status))

    def _watch_until_ended(self, view: View, patience: _Patience) -> bool:
        """Watch a container's process while no engine lives; say whether one has to be opened to say more."""
        identity = view.checkpoint.identity
        if view.status.state is not ContainerState.RUNNING or identity is None:
            return True
        next_knock = 0.0
        while observe_process(identity)[0] is Process.ALIVE:
            if self._is_closed:
                raise ClosedError("the command is ending")
            patience.renew()
            if time.monotonic() >= next_knock:
                if self._has_live_engine():
                    return False
                next_knock = time.monotonic() + _KNOCK_SECONDS
            time.sleep(_LOOK_SECONDS)
        return True

    def _has_live_engine(self) -> bool:
        try:
            ask_live(self.state_dir, Info(), node=self._place.node, silence=_KNOCK_SECONDS)
        except LimpetError:
            return False
        return True

    def _let_go(self) -> None:
        """Close the engine that was opened here: the containers run on, and others may open one."""
        with self._opening:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()

    def _open(self) -> tuple[Engine, bool]:
        """Return the engine that is open here, and whether it was opened just now."""
        with self._opening:
            if self._is_closed:
                raise ClosedError("the command is ending")
            if self._engine is not None:
                return self._engine, False
            if self._is_there:  # if it was moved or removed meanwhile, no empty one takes its place
                require_state(self.state_dir)
            self._engine = Engine.open(self.state_dir, node=self._place.node, runtimes=self._find_runtimes())
            self._is_there = True
            return self._engine, True

    def _find_runtimes(self) -> dict[str, Starter]:
        """Return the OCI runtimes that were used here, by their own names, and the one that is asked for.

        Raises InvalidInputError for one that only a program could bring.
        """
        used = os.path.join(self.state_dir, OCI)
        names = set(os.listdir(used)) if os.path.isdir(used) else set()
        if self._runtime and self._runtime not in RUNTIMES:
            raise InvalidInputError(
                f"--runtime {quote(self._runtime)}: use one of {', '.join(sorted(RUNTIMES))}; others are there only"
                " while a program that brings them has the state open"
            )
        names = (names | {self._runtime}) & RUNTIMES
        if not names:
            return {}
        from limpet.engine.starters.oci import OciStarter  # noqa: PLC0415  # it takes long to load

        return {name: OciStarter(name) for name in sorted(names)}


def _require_usable(state_dir: str) -> str:
    """Return the path of a state directory, which may be missing. Raises StateDirectoryError for another user's."""
    path = resolve_directory(state_dir)
    if os.path.lexists(path):
        check_directory(path, is_read=True)
    return path


def each(texts: Iterable[str], do: Callable[[str], _T]) -> tuple[list[_T], int]:
    """Call `do` with each text, side by side; return what came of them in order, and the exit status.

    One that fails keeps no other from it: its error goes to stderr, and its status is the exit status.
    """
    results: list[_T] = []
    status = 0
    wanted = list(dict.fromkeys(texts))
    if len(wanted) == 1:  # nothing to do side by side, and Ctrl-C ends it at once
        return [do(wanted[0])], 0
    with ThreadPoolExecutor(min(len(wanted), _MOST_AT_ONCE)) as threads:
        for future in [threads.submit(do, text) for text in wanted]:
            try:
                results.append(future.result())
            except LimpetError as error:
                note(f"limpet: {tell_error(error)}")
                status = status or exit_status(error)
    return results, status
