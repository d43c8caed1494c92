"""What programs around an engine do to it: each is served, or told at once what is in the way."""

import subprocess
import sys
from collections.abc import Coroutine
from typing import Any

import pytest

from limpet import AsyncEngine, AsyncStore, Engine, errors

REPLACED = """
import _thread, os, select, sys

def replaced(*_):
    sys.exit("it was called")

replaced.__module__ = sys.argv[2]
if sys.argv[3] == "select":
    select.select = replaced
    del select.poll, select.epoll  # as either does
else:
    vars({"_thread": _thread, "os": os}[sys.argv[3]])[sys.argv[4]] = replaced
from limpet import Engine, Store, errors
for kind in (Engine, Store):
    try:
        kind.open(sys.argv[1])
    except errors.UnsupportedError as error:
        assert "=False" in str(error), error
    else:
        sys.exit(f"{kind} was opened")
"""


@pytest.mark.parametrize(
    "replaced",
    [
        ("gevent.thread", "_thread", "start_new_thread"),
        ("gevent.os", "os", "posix_spawn"),
        ("eventlet.green.select", "select", "select"),
    ],
    ids=lambda replaced: replaced[0],
)
def test_who_replaces_the_systems_calls_is_named(state_dir: str, replaced: tuple[str, ...]) -> None:
    """All can be imported where gevent or eventlet has patched everything, and opening says how to keep it off."""
    command = [sys.executable, "-c", REPLACED, state_dir, *replaced]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_task_that_asyncio_does_not_run_is_refused(engine: Engine) -> None:
    """Under another loop, as trio's, each call says that it needs asyncio's, and nothing is left open."""

    def ask(task: Coroutine[Any, Any, object]) -> None:
        with pytest.raises(errors.UnsupportedError, match="asyncio"):
            task.send(None)

    async def open_it(kind: Any, state_dir: str) -> None:
        await kind.open(state_dir)

    container = engine.create_container(
        {"metadata": {"name": "one"}, "image": {"image": "host"}, "command": ["true"]},
        engine.create_sandbox({"metadata": {"name": "pod"}}),
    )
    front = AsyncEngine(engine)
    for kind in (AsyncEngine, AsyncStore):
        ask(open_it(kind, f"{engine.store.directory.path}-other"))
    ask(front.get(container.id))
    ask(front.create_sandbox({"metadata": {"name": "other"}}))
    ask(front.close())
