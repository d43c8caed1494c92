"""What the tests of the image store share."""

import sys
from pathlib import Path

import pytest

from limpet.engine.images import DirectoryImageStore

sys.path.append(str(Path(__file__).parent))  # for oci_layout: in importlib mode pytest adds nothing itself


@pytest.fixture
def store(tmp_path: Path) -> DirectoryImageStore:
    """An empty image store."""
    return DirectoryImageStore(str(tmp_path / "store"))
