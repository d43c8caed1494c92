"""How the status of a container that has ended is made."""

import pytest

from limpet.schema import Status
from limpet.schema.status import end

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("asked_at", "code", "reason"),
    [
        (0, 137, "OOMKilled"),
        (0, 5, "OOMKilled"),
        (0, 0, "Completed"),
        (0, None, "Unknown"),
        (7 * SECOND, 137, "Error"),
        (7 * SECOND, 5, "Error"),
        (7 * SECOND, 0, "Completed"),
        (8 * SECOND + 4_000_000, 137, "Error"),  # by the time of a file, which is that of the clock's last tick
        (9 * SECOND, 137, "OOMKilled"),
    ],
)
def test_one_that_has_run_out_of_memory(asked_at: int, code: int | None, reason: str) -> None:
    """Unless it could do without what was killed: it ended well, or ran on until it was asked to stop."""
    status = Status(pid=1, created_at=1, started_at=1, stop_requested_at=asked_at)
    ended = end(status, code, finished_at=8 * SECOND, is_out_of_memory=True)
    assert ended.reason == reason
    assert ("want of memory" in ended.message) is bool(code)
    assert ended.message.startswith("it was asked to stop") is (reason == "Error")
