"""The names of the directories that belong to ids."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from limpet.schema.errors import InvalidInputError
from limpet.schema.file_name import file_name, find_owners
from limpet.schema.metadata import require_id

FOREIGN = [
    "ns/pod",
    "unit@x.service",
    "docker://4f5e/../..",
    "..",
    "/",
    "%2F",
    "%",
    "a" * 256,
    "\u732b" * 256,
    "-rf",
    "a b",
]
IDS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=256) | st.sampled_from(FOREIGN)


@given(st.lists(IDS, unique=True, max_size=8))
@example(FOREIGN)
@example(["a/b", file_name("a/b"), file_name(file_name("a/b"))])
def test_each_id_has_a_safe_name_of_its_own(ids: list[str]) -> None:
    """The name is one component that fits a file system, and leads back to its id alone."""
    names = [file_name(require_id(each)) for each in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        assert "/" not in name
        assert name not in {".", ".."}
        assert len(os.fsencode(f"limpet-{name}.1794900000000000000")) <= 255
    assert find_owners([*names, "%zz", "stranger"], ids) == dict(zip(names, ids, strict=True))
    assert find_owners(names, ids[1:]) == dict(zip(names[1:], ids[1:], strict=True))


def test_an_ordinary_id_is_its_own_name() -> None:
    """What is a safe file name stays as it is, as state directories of older versions have it."""
    for plain in ("a", "4f5e" * 16, "web_1.2-x"):
        assert file_name(plain) == plain


@pytest.mark.parametrize("bad", ["", " ", " a", "a ", "a\n", "a\x00b", "\ud800", "x" * 257, "\u2028"])
def test_what_is_no_id_is_refused(bad: str) -> None:
    """Nothing, more than 256 characters, spaces around it, and what cannot be printed."""
    with pytest.raises(InvalidInputError, match="use 1 to 256 printable"):
        require_id(bad)
