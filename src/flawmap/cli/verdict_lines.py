"""What `inspect` prints: a table, JSON lines or CSV, one image at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import click

from flawmap.text import cell, printable

if TYPE_CHECKING:
    from flawmap.judging.inspection import Inspection

SCHEMA = 1
"""Of a JSON line: it grows by further keys, and is counted up where one changes its meaning or goes."""

_COLUMNS = ("path", "verdict", "score", "p_value", "threshold", "regions", "milliseconds", "error")


class VerdictLines:
    """Prints one inspection at a time, so that a long run can be followed and piped."""

    def __init__(self, form: str, width: int, model: str | None) -> None:
        self.form, self.width, self.model = form, width, model
        if form == "csv":
            self._row(_COLUMNS)
        elif form == "table":
            click.echo(f"{'image':<{width}}  verdict      score  p-value  regions")

    def __call__(self, inspection: Inspection) -> None:
        values = inspection.to_json()
        if self.form == "jsonl":
            judged = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            click.echo(json.dumps({"schema": SCHEMA, "time": judged, "model": self.model, **values}, allow_nan=False))
        elif self.form == "csv":
            values["regions"] = len(values["regions"])
            if str(values["path"]).startswith(("=", "+", "-", "@")):  # no formula for a spreadsheet, and the same file
                values["path"] = f"./{values['path']}"
            self._row(["" if values[column] is None else values[column] for column in _COLUMNS])
        elif inspection.score is None:
            click.echo(f"{printable(values['path']):<{self.width}}  {'error':<7}")
        else:
            p_value = "-" if inspection.p_value is None else f"{inspection.p_value:.4f}"
            click.echo(
                f"{printable(values['path']):<{self.width}}  {inspection.verdict or '-':<7}  {inspection.score:9.4g}  "
                f"{p_value:>7}  {len(inspection.regions):7d}{'*' if inspection.overruled else ''}"
            )

    def _row(self, values: Iterable[object]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow([v if isinstance(v, (int, float)) else cell(v) for v in values])
        click.echo(line.getvalue())
