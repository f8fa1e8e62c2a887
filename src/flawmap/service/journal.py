"""The log of inspections: one JSON line each, in a file that rotates."""

from __future__ import annotations

import json
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from flawmap.service.records import iso
from flawmap.service.tables import InspectionRow

_BYTES, _FILES = 10_000_000, 5


class Journal:
    """Writes; a full disk costs lines and no verdict."""

    def __init__(self, path: Path) -> None:
        self._handler = RotatingFileHandler(path, maxBytes=_BYTES, backupCount=_FILES, encoding="utf-8", delay=True)
        self._handler.handleError = lambda record: None  # type: ignore[method-assign]
        self._handler.setFormatter(logging.Formatter("%(message)s"))

    def write(self, row: InspectionRow) -> None:
        """One line."""
        line = json.dumps({"event": "inspection", **inspection_json(row)}, ensure_ascii=False, allow_nan=False)
        self._handler.handle(logging.LogRecord("flawmap.journal", logging.INFO, "", 0, line, None, None))


def inspection_json(row: InspectionRow) -> dict[str, Any]:
    """An inspection in plain JSON types: what REST answers, files hold and sinks tell."""
    return {
        "id": row.id,
        "at": iso(row.at),
        "model": row.model,
        "model_digest": row.model_digest,
        "threshold_version": row.threshold_version,
        "source": row.source,
        "name": row.name,
        "image_digest": row.image_digest,
        "width": row.width,
        "height": row.height,
        "verdict": row.verdict,
        "score": row.score,
        "p_value": row.p_value,
        "threshold": row.threshold,
        "regions": row.regions,
        "error": row.error,
        "milliseconds": round(row.milliseconds, 2),
        "word": row.word,
        "word_by": row.word_by,
        "word_at": iso(row.word_at),
    }
