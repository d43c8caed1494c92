"""The page docs/getting-started.md works when it is followed to the letter."""

import re
import shutil
from pathlib import Path

from tests.docs.sessions import follow, read_files, read_sessions

ROOT = Path(__file__).parents[2]
EXECUTOR = ROOT / "docs" / "examples" / "ci_executor.py"
PAGE = (ROOT / "docs" / "getting-started.md").read_text()
FILES = read_files(PAGE)
EXCERPTS = re.findall(r"```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    """Its files, saved under their names, and its commands, given in order, print what stands below them."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    shutil.copy(EXECUTOR, tmp_path)
    sessions = read_sessions(PAGE)
    assert len(sessions) == 6
    for command, expected in sessions:
        printed, errors = follow(command, tmp_path)
        # Steps of one stage run side by side: their lines come in any order.
        assert sorted(printed) == sorted(expected.splitlines()), (command, errors)


def test_what_the_page_explains_is_the_program() -> None:
    """Each piece of the executor on the page is the example's own text, and the page counts its lines right."""
    program = EXECUTOR.read_text()
    excerpts = [text for text in EXCERPTS if text not in FILES.values()]
    assert len(excerpts) == 3
    for excerpt in excerpts:
        assert excerpt in program
    assert f"{len(program.splitlines())} lines" in PAGE
