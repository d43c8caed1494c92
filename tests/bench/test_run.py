"""The benchmark runs: everybody keeps what they acknowledge, the report is whole, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest

from limpet.benchmarks import BenchReport, Settings, run_bench
from limpet.benchmarks.checkpoints import CONTENDERS, require_kept
from limpet.benchmarks.databases import RawSqlite
from limpet.benchmarks.experiments import EXPERIMENTS
from limpet.benchmarks.figures import Cell, Outcome
from limpet.benchmarks.load import Load, run_threads
from limpet.benchmarks.machine import describe_machine
from limpet.benchmarks.population import read_identities
from limpet.benchmarks.run import choose_cases
from limpet.benchmarks.saved import load_report, save_report
from limpet.schema.errors import InvalidInputError, StoreError
from tests.conftest import is_running, wait_until

SMALL = {
    "growth": (20, 40),
    "opening": (40,),
    "memory": (40,),
    "lists": (200,),
    "liveness": (4,),
    "waiting": (4,),
    "life": (10,),
    "command": (40,),
}
MEASURE = """
import sys, msgspec
from limpet.benchmarks.figures import Cell
from limpet.benchmarks.worker import measure
outcome = measure(msgspec.json.decode(sys.argv[1], type=Cell))
sys.stdout.buffer.write(msgspec.json.encode(outcome))
"""
"""Measures one cell, in a process of its own."""
OPTIONAL = {"opening": {"open_ms", "recover_ms"}}
"""Metrics that not every contender of an experiment has."""
NOT_INSTALLED = {"", *(f"{name} is not installed" for name in ("lmdb", "diskcache", "bwrap", "runc", "crun"))}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """All experiments, with tiny cells and populations."""
    directory = str(tmp_path_factory.mktemp("bench"))
    return Settings(directory=directory, extent="quick", seconds=0.03, seed=7, sizes=SMALL)


@pytest.fixture(scope="module")
def report(settings: Settings) -> BenchReport:
    """What came of them."""
    return run_bench(settings)


@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")  # diskcache's, one of each thread
@pytest.mark.parametrize("key", CONTENDERS)
def test_each_contender_keeps_what_it_acknowledges(key: str, tmp_path: Path) -> None:
    """A contender that kept nothing would be fast: after threads have used it, it is read back from disk."""
    kind = CONTENDERS[key]
    contender = kind(str(tmp_path))
    contender.open(30)
    finished = run_threads(Load(3, 30, calls=20), contender.checkpoint)
    contender.close()
    assert len(finished.kept) == 30
    require_kept(contender, finished.kept)


def test_who_forgets_a_checkpoint_is_found_out(tmp_path: Path) -> None:
    """Reading back has teeth: one update that is acknowledged and not made is noticed."""

    class Forgetful(RawSqlite):
        def checkpoint(self, number: int, turn: int) -> None:
            if (number, turn) != (7, 20):
                super().checkpoint(number, turn)

    contender = Forgetful(str(tmp_path))
    contender.open(10)
    for turn in (10, 20):
        contender.checkpoint(7, turn)
    contender.close()
    with pytest.raises(StoreError, match="acknowledged 20, on disk 10"):
        require_kept(contender, {7: 20})


@pytest.mark.long
def test_a_quick_run_measures_everything_and_leaves_nothing(settings: Settings, report: BenchReport) -> None:
    """Each case has all figures of its experiment, or says what is missing; the directory is as it was."""
    assert [series.case for series in report.series] == list(choose_cases(settings))
    for series in report.series:
        assert not series.failed, series
        if not series.missing:
            wanted = {metric.key for metric in EXPERIMENTS[series.experiment].metrics}
            if series.experiment == "life" and series.contender != "limpet":
                wanted = {"life_ms", "per_second"}
            assert wanted - set(series.spreads) <= OPTIONAL.get(series.experiment, set()), series
            assert all(spread.count == 1 for spread in series.spreads.values())
    missing = {series.missing for series in report.series}
    assert {text for text in missing if "does not work here" not in text} <= NOT_INSTALLED
    assert os.listdir(settings.directory) == []


@pytest.mark.long
@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_an_oci_runtime_is_measured_with_limpet_and_without(runtime: str, tmp_path: Path) -> None:
    """Both live under conmon, from the same config; only limpet has containers beside which they live."""
    figures = {}
    for contender in (f"limpet-{runtime}", f"{runtime}-conmon"):
        (tmp_path / contender).mkdir()
        cell = Cell(experiment="life", contender=contender, size=2, seconds=0.03, directory=str(tmp_path / contender))
        command = (sys.executable, "-c", MEASURE, msgspec.json.encode(cell).decode())
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=100)
        outcome = msgspec.json.decode(done.stdout, type=Outcome)
        if outcome.missing:
            pytest.skip(outcome.missing)
        assert not outcome.failed
        figures[contender] = outcome.figures
    ours, bare = figures.values()
    assert {"life_ms", "start_p50_us", "per_second"} <= set(bare)
    assert set(bare) | {"release_us", "delete_us", "cleared_per_second", "reopen_ms"} <= set(ours) | {"life_us"}


@pytest.mark.long
def test_a_report_says_where_it_was_made_and_survives_saving(report: BenchReport, tmp_path: Path) -> None:
    """The document has the machine and every version, and is read back as it was; something else is refused."""
    assert {"cpu", "cores", "memory_bytes", "kernel", "file_system", "durable"} == set(report.machine)
    assert {"python", "sqlite", "sqlalchemy", "msgspec", "limpet", "commit"} <= set(report.versions)
    assert {"turns", "seconds", "seed", "extent"} <= set(report.settings)
    path = str(tmp_path / "report.json")
    save_report(report, path)
    assert load_report(path) == report
    Path(path).write_text('{"containers": []}')
    with pytest.raises(InvalidInputError, match="not a report"):
        load_report(path)


@pytest.mark.long
def test_plots_are_drawn_of_what_was_measured(report: BenchReport, tmp_path: Path) -> None:
    """Each plot is there as a picture and as a drawing, and the same report gives the same drawing again."""
    from limpet.benchmarks.plots import draw_plots

    paths = [Path(path) for path in draw_plots(report, str(tmp_path / "plots"))]
    assert {path.stem for path in paths} == {"throughput", "latency", "opening", "growth", "life"}
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ET.parse(path).getroot().tag.endswith("svg")
    first = {path: path.read_bytes() for path in paths if path.suffix == ".svg"}
    list(draw_plots(report, str(tmp_path / "plots")))
    assert {path: path.read_bytes() for path in first} == first


def bench(*arguments: str) -> list[str]:
    """Return the command line of a benchmark."""
    return [sys.executable, "-m", "limpet", "bench", *arguments]


@pytest.mark.long
def test_the_command_saves_and_compares(tmp_path: Path) -> None:
    """The document on stdout is the one that is saved, and a later run is compared with it."""
    saved = str(tmp_path / "saved.json")
    common = ("--quick", "--only", "liveness", "--dir", str(tmp_path), "-o", "json")
    first = subprocess.run(bench(*common, "--save", saved), capture_output=True, text=True, check=True, timeout=60)
    document = json.loads(first.stdout)
    assert document.pop("comparison") == []
    assert document == json.loads(Path(saved).read_text())
    second = subprocess.run(bench(*common, "--compare", saved), capture_output=True, text=True, check=True, timeout=60)
    comparison = json.loads(second.stdout)["comparison"]
    assert {one["change"] for one in comparison} == {"too few turns to tell"}
    assert [path.name for path in tmp_path.iterdir()] == ["saved.json"]


@pytest.mark.long
def test_without_matplotlib_there_are_figures_but_no_plots(tmp_path: Path) -> None:
    """What limpet does not need is said to be missing, after a run that is as good as any."""
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "matplotlib.py").write_text("raise ModuleNotFoundError('not here', name='matplotlib')")
    command = bench("--quick", "--only", "waiting", "--dir", str(tmp_path), "--plots", str(tmp_path / "plots"))
    environment = {**os.environ, "PYTHONPATH": str(stub)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    assert done.stderr == "limpet: no plots drawn: matplotlib is not installed; pip install 'limpet[plots]'\n"
    assert "limpet: one epoll set" in done.stdout


@pytest.fixture(params=[(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def interrupted(request: pytest.FixtureRequest, tmp_path: Path) -> list[int]:
    """The pids of a population whose benchmark was ended by a signal."""
    number, status = request.param
    process = subprocess.Popen(
        bench("--quick", "--repeat", "99", "--only", "waiting", "--dir", str(tmp_path)), stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: list(tmp_path.glob("*/stage/limpet-1000/owner.json")), "the population")
        (made,) = tmp_path.glob("*/stage")
        pids = [identity.pid for identity in read_identities(str(made))]
        process.send_signal(number)
        assert process.wait(30) == status
    finally:
        process.kill()
        process.wait()
    return pids


def test_an_interrupted_run_leaves_nothing(interrupted: list[int], tmp_path: Path) -> None:
    """No file and no process is left when a signal ends the run."""
    assert list(tmp_path.iterdir()) == []
    assert interrupted
    wait_until(lambda: not any(map(is_running, interrupted)), "the end of the population")


def test_a_file_system_in_memory_is_not_called_durable() -> None:
    """A flush to memory is worth nothing, and the report says so."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs here")
    assert describe_machine("/dev/shm")["durable"] is False


def test_flushes_of_a_life_are_counted_wherever_they_are_made(tmp_path: Path) -> None:
    """The benchmark's count is that of a life under a tracer: a flush more in each life is seen, of a child, too."""
    script = (
        "import os, subprocess, sys; from limpet.benchmarks import lives\n"
        "from limpet.testing import supported\n"
        "if (reason := supported()) is not None: sys.exit(reason)\n"
        "plain, real = lives._count_flushes(sys.argv[1])['flushes'], lives._live\n"
        "child = 'import os; os.fsync(os.open(\"/\", os.O_RDONLY))'\n"
        "def live(*all): real(*all); subprocess.run([sys.executable, '-S', '-c', child], check=True)\n"
        "lives._live = live\n"
        "os.mkdir(sys.argv[1] + '/more'); print(plain, lives._count_flushes(sys.argv[1] + '/more')['flushes'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    if done.returncode and "Traceback" not in done.stderr:
        pytest.skip(done.stderr)
    plain, more = map(float, done.stdout.split())
    assert plain <= 9
    assert more == plain + 1
