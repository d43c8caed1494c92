"""Which capabilities a container gets: pure, of what is asked for and of what this process has."""

import struct

import pytest

from limpet.engine.starters.oci import capabilities
from limpet.engine.starters.oci.capabilities import (
    DEFAULT,
    choose,
    find_missing,
    find_not_given,
    find_undropped,
    to_spec,
)
from limpet.schema.cri import Capability
from limpet.schema.errors import InvalidInputError

HAVE = (*DEFAULT, "SYS_ADMIN", "SYS_TIME")


def test_a_privileged_one_has_all_and_the_ambient_ones() -> None:
    """Its program has these as another user than root, too; a name that is none is refused there as well."""
    asked = Capability(drop_capabilities=("ALL",), add_ambient_capabilities=("cap_kill", "SYS_BOOT"))
    assert choose(asked, privileged=True) == (HAVE, ("KILL",))
    with pytest.raises(InvalidInputError, match="no such capability"):
        choose(Capability(add_capabilities=("nosuch",)), privileged=True)


@pytest.fixture(autouse=True)
def some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have some capabilities, as an engine in a container does."""
    monkeypatch.setattr(capabilities, "available", lambda: HAVE)


@pytest.mark.parametrize(
    ("add", "drop", "ambient", "chosen", "kept"),
    [
        ([], [], [], {*DEFAULT}, ()),
        (["SYS_TIME"], [], [], {*DEFAULT, "SYS_TIME"}, ()),
        (["cap_sys_time"], ["KILL", "SYS_TIME"], [], {*DEFAULT, "SYS_TIME"} - {"KILL"}, ()),
        (["ALL"], ["KILL"], [], {*HAVE} - {"KILL"}, ()),
        (["SYS_TIME"], ["ALL"], [], {"SYS_TIME"}, ()),
        (["ALL"], ["ALL"], [], {*HAVE}, ()),
        ([], ["ALL"], ["SYS_ADMIN"], {"SYS_ADMIN"}, ("SYS_ADMIN",)),
        ([], ["KILL"], ["KILL", "SYS_ADMIN"], {*DEFAULT, "SYS_ADMIN"}, ("KILL", "SYS_ADMIN")),
        (["SYS_BOOT"], [], ["SYS_BOOT"], {*DEFAULT}, ()),
    ],
)
def test_what_is_asked_for_is_chosen(
    add: list[str], drop: list[str], ambient: list[str], chosen: set[str], kept: tuple[str, ...]
) -> None:
    """Added ones win over dropped ones, ambient ones are the program's in any case, what we have not is left out."""
    asked = Capability(
        add_capabilities=tuple(add), drop_capabilities=tuple(drop), add_ambient_capabilities=tuple(ambient)
    )
    found, ambient_ones = choose(asked, privileged=False)
    assert (set(found), ambient_ones) == (chosen, kept)
    assert len(found) == len(chosen)
    assert choose(asked, privileged=True) == (HAVE, kept)
    assert find_missing(asked) == (("SYS_BOOT",) if "SYS_BOOT" in add else ())
    undropped = tuple(name for name in drop if name in {*(each.upper().removeprefix("CAP_") for each in add), *ambient})
    assert find_undropped(asked) == undropped


@pytest.mark.parametrize("field", ["add_capabilities", "drop_capabilities", "add_ambient_capabilities"])
def test_what_is_no_capability_is_refused(field: str) -> None:
    """By the field and the name; "ALL" is a word of the first two alone."""
    with pytest.raises(InvalidInputError, match=f"capabilities.{field} 'NO_SUCH'"):
        choose(Capability(**{field: ("NO_SUCH",)}), privileged=False)
    if field == "add_ambient_capabilities":
        with pytest.raises(InvalidInputError, match="'ALL'"):
            choose(Capability(**{field: ("ALL",)}), privileged=False)


def test_another_user_has_the_ambient_ones_alone() -> None:
    """Root's programs have all that were chosen; others can at most get them, by a file that grants them."""
    assert to_spec(["KILL"], [], is_root=True) == {
        each: ["CAP_KILL"] for each in ("bounding", "effective", "permitted")
    }
    assert to_spec(["KILL"], [], is_root=False) == {"bounding": ["CAP_KILL"], "effective": [], "permitted": []}
    other = to_spec(["CHOWN", "KILL"], ["KILL"], is_root=False)
    assert other.pop("bounding") == ["CAP_CHOWN", "CAP_KILL"]
    assert other == {each: ["CAP_KILL"] for each in ("effective", "permitted", "inheritable", "ambient")}


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ((0x02000001, 1 << 12 | 1 << 13, 1 << 13, 1 << 2, 1 << 2), ["CAP_NET_ADMIN"]),
        ((0x02000001, 1 << 12 | 1 << 13, 0, 1 << 2, 0), ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYSLOG"]),
        ((0x02000001, 1 << 10, 0, 0, 0), []),
        ((0x02000000, 1 << 12, 0, 0, 0), []),
        ((0x03000001, 1 << 12, 0, 0, 0), []),
    ],
)
def test_what_a_file_counts_on(attribute: tuple[int, ...], expected: list[str]) -> None:
    """What is in the bounding set, or inherited by program and file, is there; all is asked for only with the flag."""
    given = {"bounding": ["CAP_NET_BIND_SERVICE"], "inheritable": ["CAP_NET_RAW", "CAP_SYSLOG", "CAP_NET_ADMIN"]}
    assert find_not_given(struct.pack("<5I", *attribute), given) == expected
    assert find_not_given(b"", given) == []
