"""A page's files and commands, and what the commands print, as somebody who follows the page sees it."""

import os
import re
import subprocess
import sys
from pathlib import Path


def read_files(page: str) -> dict[str, str]:
    """Return the text of each file that a page shows below its name."""
    return dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", page, re.DOTALL | re.MULTILINE))


def read_sessions(page: str) -> list[tuple[str, str]]:
    """Return each command that a page shows, in order, and what it prints there."""
    consoles = "".join(re.findall(r"```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    return re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", consoles, re.MULTILINE)


def follow(command: str, directory: Path) -> tuple[list[str], str]:
    """Give a command in a directory, and return the lines that it prints, and what it says as errors."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=directory,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,  # a program of a page may fail, or kill itself
    )
    return done.stdout.splitlines(), done.stderr
