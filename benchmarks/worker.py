"""The code of a run's processes: `python -m limpet.benchmarks.worker serve`, or `hold PLAN`.

Each cell is measured in a fork of a process that has loaded all modules and done nothing else. So no cell affects the
next, and none measures module loading.
"""

import os
import sys
from typing import IO, NoReturn

import msgspec

from limpet.benchmarks.contenders import UnavailableError
from limpet.benchmarks.experiments import EXPERIMENTS
from limpet.benchmarks.figures import Cell, Outcome
from limpet.benchmarks.population import Population, hold
from limpet.schema.decoders import make_decoder

_population = make_decoder(Population)
_cell = make_decoder(Cell)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Measure each requested cell in a fork of this process."""
    for line in requests:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if not pid:
            _measure_and_exit(line, write_end)
        os.close(write_end)
        with open(read_end, "rb") as file:
            answer = file.read()
        _, wait_status = os.waitpid(pid, 0)
        if not answer:
            code = os.waitstatus_to_exitcode(wait_status)
            answer = msgspec.json.encode(Outcome(failed=f"its process ended with {code}"))
        answers.write(answer + b"\n")
        answers.flush()


def _measure_and_exit(request: bytes, descriptor: int) -> NoReturn:
    outcome = measure(_cell.decode(request))
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.encode(outcome))
    os._exit(0)


def measure(cell: Cell) -> Outcome:
    """Measure a cell in this process."""
    try:
        return Outcome(figures=EXPERIMENTS[cell.experiment].measure(cell))
    except UnavailableError as error:
        return Outcome(missing=str(error))
    except Exception as error:  # noqa: BLE001  # a contender that fails is reported, the others go on
        return Outcome(failed=f"{type(error).__name__}: {error}")


def main() -> None:
    """Do what the command line says, serve cells or hold a population, until stdin ends."""
    task, *arguments = sys.argv[1:]
    if task == "hold":
        hold(_population.decode(arguments[0]), sys.stdin.buffer)
        return
    with open(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # a contender's own output is not an answer
        _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
