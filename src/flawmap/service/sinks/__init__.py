"""Whoever is told of inspections: webhooks, MQTT, OPC UA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from flawmap.service.journal import inspection_json
from flawmap.service.tables import InspectionRow

SCHEMA = 1
"""Of `told`: it grows by further keys, and is counted up where one changes its meaning or goes."""


_SHARED = (
    *("id", "at", "model", "model_digest", "threshold_version", "source", "verdict", "score", "p_value", "threshold"),
    *("regions", "milliseconds", "error"),
)


class Sink(Protocol):
    """One that is told of each inspection when it is committed."""

    def tell(self, inspection: Mapping[str, Any]) -> None:
        """Takes what `told` gives, and returns at once."""

    def close(self) -> None:
        """Tells what is left, for some seconds at most."""


def told(row: InspectionRow) -> dict[str, Any]:
    """What a sink is told: plain JSON types, the keys of `Inspection.to_json` and what the records add."""
    known = inspection_json(row)
    return {
        "schema": SCHEMA,
        **{name: known[name] for name in _SHARED},
        "path": known["name"],
        "unsure_between": None,
        "digest": known["image_digest"] or None,
    }
