"""What is said of the campaigns is what they are."""

from pathlib import Path

from tests.campaigns.sizes import CAMPAIGNS, PART, render

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table() -> None:
    """docs/testing.md has the table that `python -m tests.campaigns.sizes` prints."""
    assert render() in (ROOT / "docs" / "testing.md").read_text()


def test_each_is_larger_in_the_gate_and_larger_still_in_the_long_run() -> None:
    """`make test` tries about a fortieth, or leaves it to the gate."""
    for name, campaign in CAMPAIGNS.items():
        assert campaign.test == 0 or PART / 2 < campaign.gate / campaign.test < PART * 3 / 2, name
        assert campaign.long_run == 0 or campaign.long_run > campaign.gate, name


def test_each_has_a_test() -> None:
    """Each campaign of the table is named by the marker of some test."""
    source = "".join(path.read_text() for path in ROOT.glob("tests/*/test_*.py"))
    missing = {name for name in CAMPAIGNS if f'mark.campaign("{name}")' not in source}
    assert missing == {"reuse", "reboot", "keeper"}, "those three are marked in tests/drill/test_modes.py by a variable"
