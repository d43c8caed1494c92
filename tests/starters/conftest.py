"""What each test here leaves behind in /run is freed after it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.starters.oci import free_sandboxes


@pytest.fixture(autouse=True)
def free_what_is_held(tmp_path: Path) -> Iterator[None]:
    """Free what the sandboxes of this test's own state directories still hold."""
    yield
    for found in [*tmp_path.glob("oci"), *tmp_path.glob("*/oci")]:
        free_sandboxes(str(found.parent))
