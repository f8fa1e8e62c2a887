"""The parts of the page that NiceGUI does not bring: small pictures, a viewer, a threshold to drag, a drop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from nicegui.element import Element
from nicegui.events import GenericEventArguments

from flawmap.service.tables import InspectionRow

WORDS = {"good": "GOOD", "defect": "DEFECT", "unsure": "UNSURE", "error": "ERROR"}
SIGNS = {"good": "\N{CHECK MARK}", "defect": "\N{MULTIPLICATION X}", "unsure": "?", "error": "!"}


def when(milliseconds: int | None) -> str:
    """A time of the records as the people at this machine read it."""
    if milliseconds is None:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S")


def picture_address(row: InspectionRow, what: str) -> str:
    """Where a picture of an inspection is served: "picture", "thumb", "heat" or "outlines"; empty if it is not kept."""
    kept = row.picture if what in ("picture", "thumb") else row.map
    return "" if kept is None else f"/page-files/inspections/{row.id}/{what}"


def frame_of(row: InspectionRow) -> dict[str, Any]:
    """What a film shows of an inspection."""
    return {
        "id": row.id,
        "name": row.name,
        "verdict": row.verdict,
        "sign": SIGNS.get(row.verdict, "?"),
        "word": row.word,
        "at": when(row.at)[11:],
        "thumb": picture_address(row, "thumb"),
        "score": row.score,
    }


class Film(Element, component="film.js"):
    """Small pictures with their verdicts, one of them chosen."""

    def __init__(self, label: str, on_choose: Callable[[int], Any]) -> None:
        super().__init__()
        self._props["label"] = label
        self._props["rows"] = []
        self._props["chosen"] = None
        self.on("choose", lambda event: on_choose(int(event.args)))

    def show(self, rows: Sequence[InspectionRow], chosen: int | None) -> None:
        """Newest first."""
        self._props["rows"] = [frame_of(row) for row in rows]
        self._props["chosen"] = chosen
        self.update()


class Viewer(Element, component="viewer.js"):
    """A picture with heat and outlines over it, to zoom and to move."""

    def __init__(self) -> None:
        super().__init__()
        self.show("", "", "", "", "")

    def show(self, picture: str, heat: str, outlines: str, name: str, told: str) -> None:
        """Addresses of the three, what the picture is called, and what is said where there is none."""
        self._props.update({"picture": picture, "heat": heat, "outlines": outlines, "name": name, "told": told})
        self.update()

    def lay(self, heat: str, outlines: str) -> None:
        """Other heat over the same picture."""
        self._props.update({"heat": heat, "outlines": outlines})
        self.update()

    def look_at(self, box: Sequence[int]) -> None:
        """Brings a region (left, top, right, bottom) into view."""
        self.run_method("lookAt", list(box))


class ThresholdChart(Element, component="threshold.js"):
    """Scores, and a threshold to drag over them. It tells what follows from the threshold by itself."""

    def __init__(
        self,
        good: Sequence[float],
        inspected: Sequence[InspectionRow],
        value: float,
        *,
        may_save: bool,
        on_save: Callable[[float], Any],
    ) -> None:
        super().__init__()
        self._props["good"] = list(good)
        self._props["inspected"] = [frame_of(row) for row in inspected if row.score is not None]
        self._props["value"] = value
        self._props["may-save"] = may_save
        self.on("save", lambda event: on_save(float(event.args)))

    def settle(self, value: float) -> None:
        """The threshold that is in use now."""
        self._props["value"] = value
        self.update()


class Drop(Element, component="drop.js"):
    """Where files are dropped or chosen: each is sent as it is, to an address that answers in JSON."""

    def __init__(
        self,
        address: str,
        label: str,
        on_sent: Callable[[dict[str, Any]], Any],
        *,
        accept: str = "image/*",
        on_all: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self._props.update({"address": address, "label": label, "accept": accept})

        def sent(event: GenericEventArguments) -> Any:
            return on_sent(event.args if isinstance(event.args, dict) else {})

        self.on("sent", sent)
        if on_all is not None:
            self.on("all", lambda: on_all())

    def send_to(self, address: str) -> None:
        """Another address."""
        self._props["address"] = address
        self.update()
