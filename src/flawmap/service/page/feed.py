"""The latest inspections, as every open page shows them."""

from __future__ import annotations

import threading
import time

from flawmap.service.database import DatabaseGoneError
from flawmap.service.records import Filter, Records
from flawmap.service.tables import InspectionRow

LATEST = 200  # inspections that a page lists
_LOOK = 2.0  # seconds between looks at what other processes wrote


class Feed:
    """Filled from the thread that commits, read from the pages' event loop: both hold it for a moment only.

    Attributes:
        version: another one whenever anything is new.
    """

    def __init__(self, records: Records) -> None:
        self.version = 0
        self._records = records
        self._rows: list[InspectionRow] = []
        self._holding = threading.Lock()
        self._looked = -_LOOK
        self._looking = threading.Lock()

    def rows(self) -> list[InspectionRow]:
        """Newest first."""
        with self._holding:
            return list(self._rows)

    def add(self, row: InspectionRow) -> None:
        """Takes in an inspection, or what was said of one since."""
        with self._holding:
            others = [one for one in self._rows if one.id != row.id]
            self._rows = sorted([row, *others], key=lambda one: -one.id)[:LATEST]
            self.version += 1

    def look(self) -> None:
        """Reads what other processes wrote, if it was not done just now. Call it in a thread: it asks the database."""
        if time.monotonic() - self._looked < _LOOK or not self._looking.acquire(blocking=False):
            return
        try:
            found = self._records.latest(Filter(), LATEST)
            with self._holding:
                newer = [row for row in self._rows if not found or row.id > found[0].id]
                both = [*newer, *found][:LATEST]
                if _signs(both) != _signs(self._rows):
                    self._rows = both
                    self.version += 1
        except DatabaseGoneError:  # it may be back at the next look
            pass
        finally:
            self._looked = time.monotonic()
            self._looking.release()


def _signs(rows: list[InspectionRow]) -> list[tuple[int, str | None, str | None]]:
    return [(row.id, row.word, row.picture) for row in rows]
