"""The next column: CONTRIBUTING's steps, followed in a copy, lead to a limpet that opens every older state."""

import re
from pathlib import Path

import pytest

from tests.upgrade.next_revision import NEXT, ROOT, Copy, follow_the_steps

RECIPE = (ROOT / "CONTRIBUTING.md").read_text().partition("## A migration\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Return a copy of the project of the next revision."""
    made = Copy(tmp_path_factory.mktemp("next"))
    follow_the_steps(made)
    for command in re.findall(r"^ +(python .*)$", RECIPE, re.MULTILINE):
        arguments, _, target = command.removeprefix("python ").partition(" > ")
        done = made.run(*arguments.split())
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        if target:
            Path(made.root, target).write_text(done.stdout)
    return made


@pytest.mark.long
@pytest.mark.timeout(300)
def test_every_saved_state_opens_and_the_schema_is_one(copy: Copy) -> None:
    """Each record of each revision is what it was, none is newly damaged; migrated and fresh schema are the same."""
    done = copy.run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/upgrade/test_saved_states.py",
        "tests/store/test_migrations.py",
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def test_old_rows_have_the_new_field(copy: Copy) -> None:
    """The column is read back from rows that were written before it was there, and from new ones."""
    script = (
        "import tempfile; from limpet import Store; from tests.upgrade.saved import unpack\n"
        "from msgspec.structs import replace\n"
        "with tempfile.TemporaryDirectory() as directory, Store.open(unpack('0001', directory)) as store:\n"
        "    store.update('created', lambda status: replace(status, added='new'))\n"
        "    print(store.status('exited-0').added, store.metadata('created').added, store.status('created').added)\n"
    )
    done = copy.run("-c", script)
    assert done.stdout.split() == ["old", "old", "new"], done.stderr


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_kill_or_a_power_cut_amid_the_upgrade(copy: Copy) -> None:
    """The upgrade to the next revision may be killed at every call, or lose power, and loses nothing."""
    script = (
        "from limpet.testing import kill_points, power_cuts\nfrom tests.crash.upgrade import Upgrade\n"
        f"life = Upgrade('{int(NEXT) - 1:04}-killed')\n"
        "report = kill_points(life) + power_cuts(life, samples=1, every=4)\n"
        "print(report.points, report.images, report.violations, *report.findings[:3])\n"
    )
    done = copy.run("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    points, images, violations, *findings = done.stdout.split(maxsplit=3)
    assert int(points) > 200
    assert int(images) > 100
    assert violations == "0", findings


def test_the_recipe_names_each_file(copy: Copy) -> None:
    """CONTRIBUTING names the files that had to change, and no others."""
    named = set(re.findall(r"`((?:schema|engine|docs)/[\w/.-]+)`", RECIPE))
    assert named - {"schema/migrations/reseal.py"} == copy.edited
