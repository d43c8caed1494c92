"""Controls: with one guard taken away the campaign finds it, and the finding's command repeats it."""

from collections.abc import Callable

import pytest

from limpet.engine.images import layer
from limpet.schema import protobuf_json
from tests.campaigns.hostile.__main__ import main
from tests.campaigns.hostile.campaign import KINDS, Finding, Kind, run_kind
from tests.campaigns.hostile.oracle import Attempt, Fate, judge


def allow_climbing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layer, "clean_path", lambda name: name)


def let_a_decode_error_pass(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(protobuf_json, "_parse", protobuf_json.json.loads)  # type: ignore[attr-defined]


def wait_for_a_pipe(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "tests.campaigns.hostile.oracle.SECONDS", 4.0
    )  # no need to wait for as long as a busy machine may take
    patch.setattr("os.O_NONBLOCK", 0)


GUARDS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, int]] = {
    "climbing out of a layer": (allow_climbing, "layer", 400),
    "a decode error": (let_a_decode_error_pass, "config", 60),
    "waiting for a pipe": (wait_for_a_pipe, "bundle", 200),
}

LONG = {"waiting for a pipe"}


def first_finding(kind: str, inputs: int) -> Finding | None:
    """Return the first finding of a campaign of one kind."""
    for begin in range(0, inputs, 20):
        tally = run_kind(kind, 1, range(begin, begin + 20))
        if tally.findings:
            return tally.findings[0]
    return None


@pytest.mark.parametrize(
    ("take_away", "kind", "inputs"),
    [pytest.param(*GUARDS[name], id=name, marks=pytest.mark.long if name in LONG else ()) for name in GUARDS],
)
def test_a_guard_that_is_missing_is_found(
    take_away: Callable[[pytest.MonkeyPatch], None],
    kind: str,
    inputs: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a guard taken away there is a finding soon; its command finds it again, and finds nothing with the guard."""
    with monkeypatch.context() as patch:
        take_away(patch)
        finding = first_finding(kind, inputs)
        assert finding is not None
        assert finding.repeats, finding
        words = finding.command.split()[3:]
        patch.setattr("sys.argv", ["tests.campaigns.hostile", *words])
        assert main() == 1
        assert finding.command in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tests.campaigns.hostile", *words])
    assert main() == 0


class Growing:
    """A world whose every input takes more memory than any may, and that cannot be closed."""

    def __init__(self, _: object) -> None:
        self.mebibytes = 0

    def draw(self, _: object) -> Attempt:
        return Attempt("much", lambda: bytearray(self.mebibytes << 20).count(1))

    def inspect(self) -> str:
        return ""

    def close(self) -> None:
        if not self.mebibytes:
            raise RuntimeError("stuck")


def test_memory_is_of_the_input_alone() -> None:
    """What takes too much is found each time, whatever has taken as much before; what takes little never."""
    world = Growing(None)
    fates = []
    for size in (300, 300, 100, 300):
        world.mebibytes = size
        fates.append(judge(world, world.draw(None)).fate)
    assert fates == [Fate.FINDING, Fate.FINDING, Fate.ACCEPTED, Fate.FINDING]


def test_a_world_that_cannot_be_closed_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that cannot be closed after inputs that it took is as bad as one that fails at once."""
    monkeypatch.setitem(KINDS, "growing", Kind(Growing, 1.0, 5))
    (finding,) = run_kind("growing", 1, range(5)).findings
    assert (finding.words, finding.repeats) == ("closing the world: RuntimeError: stuck", True)
