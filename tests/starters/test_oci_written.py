"""The config.json of a start, whatever has become of it."""

from pathlib import Path

import pytest

from limpet.engine.starters.oci.run_directory import RunDirectory
from limpet.engine.starters.oci.written import read_config


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, None])
def test_what_is_no_config_is_an_empty_one(tmp_path: Path, content: bytes | None) -> None:
    """Of a bundle that was damaged or removed nobody can say whether its program could be executed."""
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert read_config(RunDirectory(str(tmp_path))) == {}
    (tmp_path / "config.json").write_bytes(b'{"process": {}}')
    assert read_config(RunDirectory(str(tmp_path))) == {"process": {}}
    assert read_config(RunDirectory(str(tmp_path / "config.json"))) == {}
    (tmp_path / "config.json").rename(tmp_path / "elsewhere")
    (tmp_path / "config.json").symlink_to("elsewhere")
    assert read_config(RunDirectory(str(tmp_path))) == {}
