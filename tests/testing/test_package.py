"""The package as its user meets it: its example is true, and it stands on nothing of the engine."""

import os
import re
import sys
import textwrap
from pathlib import Path

from limpet import testing


def test_the_example_finds_what_it_says(capsys: object) -> None:
    """The program in the package's docstring runs as it stands, and reports the payment that it loses."""
    assert testing.__doc__ is not None
    example = textwrap.dedent("\n".join(re.findall(r"^    .*|^$", testing.__doc__, re.MULTILINE)))
    names = {name: getattr(testing, name) for name in testing.__all__} | {"os": os, "sys": sys}
    exec(compile(example, "example", "exec"), names)
    assert names["report"].lost
    assert not names["report"].torn


def test_it_knows_nothing_of_the_store_that_it_tests() -> None:
    """No module imports anything of limpet but its siblings and the errors, so that it fits any store.

    The FakeStarter is for programs that use an engine, and is loaded apart.
    """
    assert testing.__file__ is not None
    for path in set(Path(testing.__file__).parent.glob("*.py")) - set(Path(testing.__file__).parent.glob("fake_*.py")):
        for module in re.findall(r"^\s*(?:from|import) (limpet[\w.]*)", path.read_text(), re.MULTILINE):
            assert module.startswith("limpet.testing") or module == "limpet.schema.errors", path
