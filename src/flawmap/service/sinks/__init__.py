"""Whoever is told of inspections: webhooks, MQTT, OPC UA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flawmap.service.records import iso
from flawmap.service.tables import InspectionRow

SCHEMA = 1
"""Of `told`: it grows by further keys, and is counted up where one changes its meaning or goes."""


class Sink(Protocol):
    """One that is told of each inspection when it is committed."""

    def tell(self, inspection: Mapping[str, Any]) -> None:
        """Takes what `told` gives, and returns at once."""

    def close(self) -> None:
        """Tells what is left, for some seconds at most."""


def told(row: InspectionRow) -> dict[str, Any]:
    """What a sink is told: plain JSON types, the keys of `Inspection.to_json` and what the records add."""
    return {
        "schema": SCHEMA,
        "id": row.id,
        "at": iso(row.at),
        "model": row.model,
        "model_digest": row.model_digest,
        "threshold_version": row.threshold_version,
        "source": row.source,
        "path": row.name,
        "verdict": row.verdict,
        "score": row.score,
        "p_value": row.p_value,
        "threshold": row.threshold,
        "unsure_between": None,
        "regions": row.regions,
        "milliseconds": round(row.milliseconds, 2),
        "digest": row.image_digest or None,
        "error": row.error,
    }
