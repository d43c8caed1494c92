"""Structured input from Hypothesis: configs, documents and tar files whose smallest failing example is shown."""

import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from limpet.engine.images.layer import apply_layer, clean_path
from limpet.engine.images.limits import Budget
from limpet.engine.images.tar import read_tar
from limpet.engine.images.tree import Tree
from limpet.engine.starters.choices import choose_log_path
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.errors import InvalidInputError, LimpetError
from limpet.schema.file_name import file_name
from limpet.schema.image import ImageName
from limpet.schema.metadata import require_id, require_name
from limpet.schema.protobuf_json import to_json
from tests.campaigns.hostile.archives import header
from tests.campaigns.hostile.canary import differences, make_canary, photograph
from tests.campaigns.hostile.engines import CONFIG, SANDBOX
from tests.campaigns.hostile.values import places, replaced

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=300)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
FEW = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
PARSERS = [(parse_container_config, CONFIG), (parse_pod_sandbox_config, SANDBOX)]


@pytest.mark.parametrize(("parse", "good"), PARSERS, ids=["container", "sandbox"])
@FEW
@given(data=st.data())
def test_a_config_is_read_or_refused(parse: Any, good: dict[str, Any], data: st.DataObject) -> None:
    """Any value in any place of a config is read, and then written and read the same, or refused with its field."""
    place = data.draw(st.sampled_from([path for path in places(good) if path]))
    config = replaced(good, place, data.draw(JSON))
    try:
        message = parse(config)
    except InvalidInputError:
        return
    assert parse(to_json(message)) == message
    assert parse(to_json(message, camel_case=True)) == message


@FEW
@given(st.binary(max_size=400) | JSON.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")))
def test_bytes_are_a_config_or_refused(data: bytes) -> None:
    """Whatever bytes are given as a config: InvalidInputError is all that comes out."""
    for parse, _ in PARSERS:
        try:
            parse(data)
        except InvalidInputError:
            continue


@FEW
@given(ANY_TEXT)
def test_what_passes_as_an_id_or_a_name_is_a_file_name(text: str) -> None:
    """An id or a name that is accepted is one component of a path, and no option of a command."""
    for require in (lambda given: file_name(require_id(given)), require_name):
        try:
            accepted = require(text)
        except InvalidInputError:
            continue
        assert "/" not in accepted
        assert "\0" not in accepted
        assert accepted not in {"", ".", ".."}
    with suppress(InvalidInputError):
        assert str(ImageName.parse(text)).isprintable()


@FEW
@example(["loop", "..", "out", "a"])
@given(st.lists(st.sampled_from(["..", ".", "a", "out", "in", "", "/", "loop"]) | ANY_TEXT, max_size=6))
def test_a_log_path_stays_in_its_directory(tmp_path: Path, parts: list[str]) -> None:
    """However a log path is put together, and whatever links lie in the directory, it does not lead out of it."""
    logs = tmp_path / "logs"
    if not logs.exists():
        (logs / "a").mkdir(parents=True)
        for name, target in (("out", ".."), ("in", "a"), ("loop", "loop")):
            (logs / name).symlink_to(target)
    log_path = "/".join(parts).replace("\0", "").encode("utf-8", "replace").decode()
    try:
        chosen = choose_log_path(str(logs), log_path)
    except InvalidInputError:
        return
    assert not chosen or Path(os.path.realpath(os.path.dirname(chosen))).is_relative_to(os.path.realpath(logs))


def test_a_log_below_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    """By the field in which it is; what is missing is made when the container is started."""
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("missing")
    for directory in ("file", "file/below", "file/"):
        with pytest.raises(InvalidInputError, match=r"^log_directory '.*/file' is no directory"):
            choose_log_path(f"{tmp_path}/{directory}", "x.log")
    for directory in ("/proc/nosuch", "/sys", "/proc/self/fd"):
        with pytest.raises(InvalidInputError, match=r"^log_directory '/.*: the kernel lets nobody make files there"):
            choose_log_path(directory, "x.log")
    for path in ("file/x.log", "file/new/x.log"):
        with pytest.raises(InvalidInputError, match=r"^log_path 'file/.*/file' is no directory"):
            choose_log_path(str(tmp_path), path)
    assert choose_log_path(f"{tmp_path}/new/below", "a/x.log") == f"{tmp_path}/new/below/a/x.log"
    assert choose_log_path(f"{tmp_path}/nowhere", "x.log") == f"{tmp_path}/missing/x.log"


NAME = st.lists(st.sampled_from([b"a", b"b", b"up", b"..", b".", b"", b".wh.a", b".wh..wh..opq", b"\xff"]), max_size=4)
MEMBER = st.tuples(NAME.map(b"/".join), st.sampled_from(b"01256x"), NAME.map(b"/".join), st.binary(max_size=20))


@FEW
@given(st.lists(MEMBER, max_size=8))
def test_a_layer_stays_in_its_tree(tmp_path_factory: pytest.TempPathFactory, members: list[Any]) -> None:
    """Whatever members follow one another, with links to anywhere among them: nothing outside of the tree changes."""
    place = tmp_path_factory.mktemp("layer")
    make_canary(place)
    (place / "root").mkdir()
    before = photograph(place, apart_from=frozenset({"root"}))
    data = header(b"up", b"2", 0, b"../around")
    for name, kind, link, content in members:
        held = content if kind == ord("0") else b""
        data += header(name, bytes([kind]), len(held), link) + held + bytes(-len(held) % 512)
    with Tree(str(place / "root"), Budget()) as tree, suppress(LimpetError):
        apply_layer(tree, read_tar(io.BytesIO(data + bytes(1024)), Budget()), Budget())
        tree.finish()
    assert not differences(before, photograph(place, apart_from=frozenset({"root"})))


@FEW
@given(st.binary(max_size=60))
def test_a_clean_path_does_not_climb(name: bytes) -> None:
    """A member's name that is accepted has neither a root nor a way up in it."""
    try:
        path = clean_path(name)
    except InvalidInputError:
        return
    assert not path.startswith(b"/")
    assert b".." not in path.split(b"/")
