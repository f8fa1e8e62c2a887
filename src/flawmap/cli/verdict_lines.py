"""What `inspect` prints: a table, JSON lines or CSV, one image at a time."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import click

from flawmap.report.wording import printable

if TYPE_CHECKING:
    from flawmap.judging.inspection import Inspection

SCHEMA = 1
"""Of a JSON line: it grows by further keys, and is counted up where one changes its meaning or goes."""

_COLUMNS = ("path", "verdict", "score", "p_value", "threshold", "regions", "milliseconds", "error")


class VerdictLines:
    """Prints one inspection at a time, so that a long run can be followed and piped.

    Attributes:
        closed: whether nobody reads what is printed any more; then nothing is.
    """

    def __init__(self, form: str, width: int, model: str | None) -> None:
        self.form, self.width, self.model = form, width, model
        self.closed = False
        if form == "csv":
            self._row(_COLUMNS)
        elif form == "table":
            self._print(f"{'image':<{width}}  verdict      score  p-value  regions")

    def __call__(self, inspection: Inspection) -> None:
        values = inspection.to_json()
        if self.form == "jsonl":
            judged = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            self._print(json.dumps({"schema": SCHEMA, "time": judged, "model": self.model, **values}, allow_nan=False))
        elif self.form == "csv":
            values["regions"] = len(values["regions"])
            self._row(["" if values[column] is None else values[column] for column in _COLUMNS])
        elif inspection.score is None:
            self._print(f"{printable(values['path']):<{self.width}}  {'error':<7}")
        else:
            self._print(
                f"{printable(values['path']):<{self.width}}  {inspection.verdict:<7}  {inspection.score:9.4g}  "
                f"{inspection.p_value:7.4f}  {len(inspection.regions):7d}{'*' if inspection.overruled else ''}"
            )

    def _row(self, values: Iterable[object]) -> None:
        line = io.StringIO()
        # A spreadsheet takes a cell that begins like this for a formula. The path is the same file.
        told = [f"./{v}" if isinstance(v, str) and v.startswith(("=", "+", "-", "@")) else v for v in values]
        csv.writer(line, lineterminator="").writerow(told)
        self._print(line.getvalue())

    def _print(self, line: str) -> None:
        if self.closed:
            return
        try:
            click.echo(line)
        except BrokenPipeError:
            self.closed = True
            # Python flushes it once more when it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
