"""What the tests of the image store share."""

from pathlib import Path

import pytest

from limpet.engine.images import DirectoryImageStore


@pytest.fixture
def store(tmp_path: Path) -> DirectoryImageStore:
    """An empty image store."""
    return DirectoryImageStore(str(tmp_path / "store"))
