"""What is noted is looked at, whatever happens meanwhile."""

from limpet.engine.lifecycle.timetable import Entry, Kind, Timetable
from limpet.schema.errors import NotFoundError
from tests.conftest import wait_until


def test_what_is_made_anew_during_a_look_is_looked_at() -> None:
    """A look that finds the one before gone does not forget the new one of the same id."""
    entry, looks = Entry(Kind.CONTAINER, "c"), []

    def look(looked_at: Entry) -> None:
        looks.append(looked_at)
        if len(looks) == 1:
            timetable.note(entry)
            raise NotFoundError("the one before is gone")

    timetable = Timetable(look)
    timetable.note(entry)
    try:
        wait_until(lambda: len(looks) == 2, "the second look")
    finally:
        timetable.close()
