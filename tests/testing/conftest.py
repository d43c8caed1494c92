"""What the tests of the crash tests share."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from limpet.testing import supported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, where the system cannot do it."""
    reason = supported()
    for item in items:
        if reason is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def no_child_left() -> Iterator[None]:
    """Whatever a test does, no process of it is left, not even a zombie."""
    with suppress(ChildProcessError):  # what an earlier test of somebody else has left is not this one's fault
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
