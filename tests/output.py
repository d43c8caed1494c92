"""What containers have written, as their logs have it a moment later."""

from pathlib import Path

from tests.conftest import wait_until


def read_output(log_path: str, ending: str) -> str:
    """Wait until the output in a log ends with `ending`; return it without the log's own words."""
    path = Path(log_path)
    wait_until(lambda: path.exists() and _strip(path).endswith(ending), f"{path} to end with {ending!r}")
    return _strip(path)


def _strip(path: Path) -> str:
    lines = path.read_text().splitlines(keepends=True)
    return "".join(line.split(" ", 3)[3] for line in lines if line.count(" ") >= 3)
