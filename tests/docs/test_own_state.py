"""The page docs/own-state.md works when it is followed to the letter."""

from pathlib import Path

from tests.docs.sessions import follow, read_files, read_sessions

PAGE = (Path(__file__).parents[2] / "docs" / "own-state.md").read_text()


def test_the_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    """Its files, saved under their names, and its commands, given in order, print what stands below them."""
    for name, text in read_files(PAGE).items():
        (tmp_path / name).write_text(text)
    sessions = read_sessions(PAGE)
    assert len(sessions) == 5
    for command, expected in sessions:
        printed, errors = follow(command, tmp_path)
        assert printed == expected.splitlines(), (command, errors)
