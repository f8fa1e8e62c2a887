"""From inspections to records: pictures first, then the row, so that no row names a picture that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flawmap.judging.inspection import Inspection
from flawmap.line.inspector import Inspector
from flawmap.service.database import now
from flawmap.service.pictures import Pictures, PicturesFullError
from flawmap.service.records import Asked, Records, Seen
from flawmap.service.tables import InspectionRow

Keep = Literal["defects", "all", "none"]

_NAME = 300  # letters of a name that are kept


@dataclass(frozen=True)
class Judged:
    """An inspection with what is known of where it came from.

    Attributes:
        inspection: with its digest.
        content: the bytes that were judged; none where there was no picture to judge.
        name: what whoever sent them calls them.
        source: "api", "page", or a watched place.
        owner: whose key it was; empty without keys.
    """

    inspection: Inspection
    content: bytes
    name: str
    source: str
    owner: str = ""


@dataclass(frozen=True)
class Recorder:
    """Keeps what is judged.

    Attributes:
        keep: of which inspections pictures are kept; "defects" are all that are not good.
        judge_when_full: whether records go on without pictures when their disk is full.
    """

    records: Records
    pictures: Pictures
    keep: Keep = "defects"
    judge_when_full: bool = False

    def record(
        self,
        model: str,
        inspector: Inspector,
        version: int,
        judged: Sequence[Judged],
        asked: Asked | None = None,
        seen: Sequence[Seen] = (),
        deliveries: Sequence[str] = (),
    ) -> list[InspectionRow]:
        """Commits inspections of one model and one request; they are on the disk when it returns.

        Args:
            model: its name.
            inspector: that judged them.
            version: of the threshold that they were judged under.
            judged, asked, seen, deliveries: see `Judged`, and `Records.add`.

        Raises:
            PicturesFullError: the disk of the pictures is full, and records are not to go on without.
            DatabaseGoneError: they could not be committed.
            RepeatedError: as `Records.add`.
        """
        scale = inspector.heat_scale()
        rows = []
        for one in judged:
            picture, drawn, stored = None, None, 0
            kept = self.keep == "all" or (self.keep == "defects" and one.inspection.verdict != "good")
            if kept and one.content:
                try:
                    picture, drawn, stored = self.pictures.keep(one.content, one.inspection, scale)
                except PicturesFullError:
                    if not self.judge_when_full:
                        raise
            values = row_of(model, inspector, version, one)
            rows.append({**values, "picture": picture, "map": drawn, "stored": stored})
        added = self.records.add(rows, asked, seen, deliveries)
        if total := sum(row["stored"] for row in rows):
            self.pictures.added(total)
        return added


def row_of(model: str, inspector: Inspector, version: int, judged: Judged) -> dict[str, Any]:
    """The values of `InspectionRow` but for the pictures."""
    found = judged.inspection
    return {
        "at": now(),
        "model": model,
        "model_digest": inspector.digest or "",
        "threshold_version": version,
        "source": judged.source,
        "name": judged.name[:_NAME],
        "owner": judged.owner,
        "image_digest": found.digest or "",
        "width": None if found.size is None else found.size[1],
        "height": None if found.size is None else found.size[0],
        "verdict": found.verdict or "unsure",
        "score": found.score,
        "p_value": found.p_value,
        "threshold": found.threshold,
        "regions": [
            {"box": [int(side) for side in region.box], "area": region.area, "peak": region.peak}
            for region in found.regions
        ],
        "error": found.error,
        "milliseconds": found.milliseconds,
        "statistics": None if found.statistics is None else [round(float(v), 6) for v in found.statistics],
    }
