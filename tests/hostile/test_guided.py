"""The targets of coverage-guided fuzzing read what is whole, end as promised, and notice a guard that is missing."""

import io
import tarfile

import pytest

from tests.campaigns.hostile import guided
from tests.campaigns.hostile.guided import KINDS, try_one


@pytest.mark.parametrize("name", KINDS)
def test_an_example_is_read_to_its_end(name: str) -> None:
    """What fuzzing begins with gets past the first checks; of all that it is cut to nothing raises what it must not."""
    for example in KINDS[name].make_examples():
        assert try_one(KINDS[name], example)
        for size in range(0, len(example), 97):
            try_one(KINDS[name], example[:size])


def test_a_missing_guard_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that climbs out is a finding where nothing refuses it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../x"))
    assert not try_one(KINDS["tar"], file.getvalue())
    monkeypatch.setattr(guided, "clean_path", lambda name: name)
    with pytest.raises(AssertionError):
        try_one(KINDS["tar"], file.getvalue())
