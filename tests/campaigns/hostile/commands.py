"""The command line: every verb with hostile words, in this process and as processes of their own."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

from limpet.engine.cli import VERBS, main
from limpet.engine.cli.exits import EXITS
from tests.campaigns.hostile import values
from tests.campaigns.hostile.engines import TRICKS, clear
from tests.campaigns.hostile.oracle import Attempt
from tests.campaigns.hostile.states import EntryWorld

STATUSES = {status for status, _, _ in EXITS}
FLAGS = (
    "-o", "json", "-ojson", "table", "--output", "--output=json", "-a", "--all", "-q", "--quiet",
    "--no-trunc", "--name", "--label", "a=b", "=", "--label=x", "--state", "running", "--state=EXITED",
    "--sandbox", "pod", "good", "goo", "bad", "ended", "", "-s", "--state-dir", "--node", "local", "--node=",
    "--dry-run", "--help", "-h", "--version", "--", "-", "--seed", "--rounds", "bash", "zsh", "fish", "--zzz",
)  # fmt: skip
VARIABLES = {
    "LANG": ("C", "POSIX", "tr_TR.UTF-8", "xx_YY.ZZZ", "", "\xff"),
    "LC_ALL": ("C", "C.UTF-8", "", "nonsense"),
    "PYTHONIOENCODING": ("ascii", "latin-1", "utf-16", "ascii:strict", "utf-8:surrogateescape"),
    "PYTHONUTF8": ("0", "1"),
    "COLUMNS": ("0", "1", "-5", "7", "999999", "x", ""),
    "LINES": ("0", "-1", "x"),
    "TERM": ("dumb", "", "x" * 1000),
    "NO_COLOR": ("", "1"),
    "FORCE_COLOR": ("1",),
    "HOME": ("", "/nonexistent", "relative"),
    "TMPDIR": ("/nonexistent", ""),
    "XDG_STATE_HOME": ("", "relative", "/nonexistent"),
    "LIMPET_NODE": ("", "other", "\udcff", "a\nb", "x" * 3000),
    "LIMPET_BUNDLE": ("", "/etc", "x"),
    "_LIMPET_COMPLETE": ("bash_source", "bash_complete", "zsh_complete", "x", "", "_", "bash"),
    "COMP_WORDS": ("", "limpet ps 'x", 'limpet "'),
    "COMP_CWORD": ("", "1", "-1", "x", "99"),
}


class CommandWorld(EntryWorld):
    """`limpet` in this process, on a state that may be spoilt."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        (place / "empty").mkdir()
        self._around = self._photograph()
        self.renew()

    def draw(self, random: Random) -> Attempt:
        args = self._draw_args(random)
        environment = self._draw_environment(random)
        encoding = random.choice(("utf-8", "utf-8", "ascii", "latin-1", "utf-16"))
        spoilt = random.random() < 0.3
        entry = random.choice([name for name in self.ENTRIES if name])
        trick = random.choice((*sorted(TRICKS), "mode", "name", "bytes"))
        seed = random.randrange(1 << 32)
        words = f"; state/{entry}: {trick} ({seed})" if spoilt else ""
        shown = f"limpet {args!r:.600} with {environment} in {encoding}{words}"

        def run() -> None:
            self.renew()
            clear(self.place / "out")
            (self.place / "out").mkdir()
            if spoilt:
                try:
                    self._spoil(self.state / entry, trick, Random(seed))
                except (NotADirectoryError, FileNotFoundError):
                    return
            self.call(args, environment, encoding)

        return Attempt(shown, run)

    def _draw_args(self, random: Random) -> list[str]:
        verb = random.choice((*VERBS, *VERBS, values.argument(random)))
        where = random.choice(
            (self.state,) * 8 + (self.place / "empty", self.place / "around" / "file", self.place / "nowhere")
        )
        if verb in {"run", "load"}:
            where = self.state  # where there is no state, they make one
        args = [
            random.choice(FLAGS) if random.random() < 0.7 else values.argument(random)
            for _ in range(random.randrange(5))
        ]
        if verb == "backup":
            args = [os.fsdecode(bytes(self.place / "out") + b"/" + values.file_name(random)), *args[:2]]
        if verb in {"drill", "bench"}:
            args.append("--rounds=0" if verb == "drill" else "--repeat=0")  # refused, or it would run for long
        place = random.choice((["-s", str(where)], [f"--state-dir={where}"]))
        return [*place, verb, *args] if random.random() < 0.9 else [verb, *args, *place]

    def _draw_environment(self, random: Random) -> dict[str, str]:
        names = random.sample(sorted(VARIABLES), random.choice((0, 0, 1, 2, 3)))
        return {name: random.choice(VARIABLES[name]) for name in names}

    def call(self, args: list[str], environment: dict[str, str], encoding: str) -> None:
        """Run it as its own process would, with these streams and variables. Raises AssertionError for a finding."""
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        streams[1].reconfigure(errors="backslashreplace")  # as Python's own stderr
        before = sys.stdout, sys.stderr, dict(os.environ)
        os.environ.update(environment, LIMPET_STATE_DIR=str(self.place / "nowhere"))
        sys.stdout, sys.stderr = streams
        status: Any = None
        try:
            main(args)
        except SystemExit as end:
            status = end.code
        finally:
            sys.stdout, sys.stderr = before[:2]
            os.environ.clear()
            os.environ.update(before[2])
        said = b"".join(stream.buffer.getvalue() for stream in streams)
        assert (status or 0) in STATUSES, f"exit status {status!r}"
        assert b"Traceback" not in said, said[-500:]
        assert status in {0, None, 7} or said or "_LIMPET_COMPLETE" in environment, f"status {status} without a word"


class ProcessWorld(CommandWorld):
    """`limpet` as a process: closed and broken streams, odd locales, terminals, words that are not UTF-8."""

    STREAMS = (
        "pipes",
        "pipes",
        "closed stdin",
        "closed stdout",
        "closed stderr",
        "all closed",
        "full",
        "broken pipe",
        "terminal",
    )

    def draw(self, random: Random) -> Attempt:
        args = [os.fsencode(each) for each in self._draw_args(random)]
        if random.random() < 0.3:
            args.append(random.choice((b"\xff", b"\xc3\x28", b"a\xe9")))
        if random.random() < 0.1:
            seed = random.choice(values.NUMBERS)
            args = [b"drill", b"--rounds=1", b"--containers=1", f"--seed={seed}"[:4000].encode(), b"-ojson"]
        environment = self._draw_environment(random)
        streams = random.choice(self.STREAMS)
        shown = f"limpet {args!r:.600} with {environment}, {streams}"
        return Attempt(shown, lambda: self._spawn(args, environment, streams))

    def _spawn(self, args: list[bytes], environment: dict[str, str], streams: str) -> None:
        self.renew()
        clear(self.place / "out")
        (self.place / "out").mkdir()
        variables = {"PATH": os.environ["PATH"], "LIMPET_STATE_DIR": str(self.place / "nowhere"), **environment}
        said, status = _run([os.fsencode(sys.executable), b"-m", b"limpet", *args], variables, streams)
        assert b"Traceback" not in said, said[-900:]
        assert b"Exception ignored" not in said, said[-900:]
        assert status in STATUSES, f"exit status {status}: {said[-300:]!r}"


_CLOSED = {
    "closed stdin": "<&-",
    "closed stdout": ">&-",
    "closed stderr": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "full": ">/dev/full",
}


def _run(command: list[bytes], environment: dict[str, str], streams: str) -> tuple[bytes, int]:
    variables = {os.fsencode(name): os.fsencode(value.replace("\xff", "\udcff")) for name, value in environment.items()}
    if streams == "terminal":
        return _run_in_terminal(command, variables)
    if streams in _CLOSED:
        command = [b"/bin/sh", b"-c", f'exec "$0" "$@" {_CLOSED[streams]}'.encode(), *command]
    if streams == "broken pipe":
        command = [b"/bin/bash", b"-c", b'"$0" "$@" | true; exit "${PIPESTATUS[0]}"', *command]
    done = subprocess.run(
        command, env=variables, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=60
    )
    return done.stdout + done.stderr, done.returncode


def _run_in_terminal(command: list[bytes], variables: dict[bytes, bytes]) -> tuple[bytes, int]:
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(command, env=variables, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        said = bytearray()
        try:
            while chunk := os.read(ours, 65536):
                said += chunk
        except OSError:  # the other end is closed
            pass
        return bytes(said), process.wait(60)
    finally:
        os.close(ours)
