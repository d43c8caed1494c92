"""A drill in its own namespaces, where it can choose pids and the boot id, even as an ordinary user.

Run as a module, with its arguments as one JSON object: this is the process inside. It prints a line for each
round, and the report as the last line.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import msgspec

from limpet.engine.drill.rehearsal import ENGINE, run_drill
from limpet.engine.drill.report import DrillReport
from limpet.engine.drill.script import Scenario
from limpet.schema.decoders import make_decoder
from limpet.testing import LifeFailedError

_ROUND = "round"
_PROBE = """
    mount --bind "$1" /proc/sys/kernel/random/boot_id && test -w /proc/sys/kernel/ns_last_pid
"""


class _Arguments(msgspec.Struct, frozen=True, kw_only=True):
    rounds: int
    containers: int
    seed: int
    directory: str
    scenario: Scenario
    engine_factory: str = ENGINE


_arguments, _report = make_decoder(_Arguments), make_decoder(DrillReport)


def find_obstacle() -> str | None:
    """Return why such namespaces are not available, None if they are."""
    try:
        done = subprocess.run(
            [*unshare(), "sh", "-c", _PROBE, "sh", __file__], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"unshare (util-linux) cannot be run: {error.strerror}"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return f"no private pid and mount namespaces: {said[-1] if said else 'ns_last_pid may not be written'}"


def run_inside(
    *,
    rounds: int,
    containers: int,
    seed: int,
    directory: str,
    scenario: Scenario,
    engine_factory: str = ENGINE,
    on_round: Callable[[], object] = lambda: None,
) -> DrillReport:
    """Run a drill in its own namespaces; see `run_drill`. Raises LifeFailedError if it fails."""
    arguments = _Arguments(
        rounds=rounds,
        containers=containers,
        seed=seed,
        directory=directory,
        scenario=scenario,
        engine_factory=engine_factory,
    )
    command = [*unshare(), sys.executable, "-m", __name__, msgspec.json.encode(arguments).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        try:
            for line in process.stdout:
                last = line.strip()
                if last == _ROUND:
                    on_round()
        except BaseException:
            process.kill()  # this also ends the pid namespace's first process, and so all others
            raise
    if process.returncode:
        raise LifeFailedError(f"the drill in its own namespaces ended with status {process.returncode}")
    return _report.decode(last)


def unshare() -> list[str]:
    """Return the command that runs another one in such namespaces; its processes end with it."""
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *as_user, "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]


def _main(text: str) -> None:
    arguments = _arguments.decode(text)
    report = run_drill(**msgspec.structs.asdict(arguments), on_round=lambda: _say(_ROUND))
    _say(msgspec.json.encode(report).decode())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main(sys.argv[1])
