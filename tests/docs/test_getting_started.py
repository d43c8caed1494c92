"""The page docs/getting-started.md works when it is followed to the letter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXECUTOR = ROOT / "docs" / "examples" / "ci_executor.py"
PAGE = (ROOT / "docs" / "getting-started.md").read_text()
FILES = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
EXCERPTS = re.findall(r"```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SESSIONS = "".join(re.findall(r"```console\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


def test_the_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    """Its files, saved under their names, and its commands, given in order, print what stands below them."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    shutil.copy(EXECUTOR, tmp_path)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    sessions = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", SESSIONS, re.MULTILINE)
    assert len(sessions) == 6
    for command, expected in sessions:
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,  # a step may fail, and crash.py kills itself
        )
        # Steps of one stage run side by side: their lines come in any order.
        assert sorted(done.stdout.splitlines()) == sorted(expected.splitlines()), (command, done.stderr)


def test_what_the_page_explains_is_the_program() -> None:
    """Each piece of the executor on the page is the example's own text, and the page counts its lines right."""
    program = EXECUTOR.read_text()
    excerpts = [text for text in EXCERPTS if text not in FILES.values()]
    assert len(excerpts) == 3
    for excerpt in excerpts:
        assert excerpt in program
    assert f"{len(program.splitlines())} lines" in PAGE
