"""What REST takes and answers, as its OpenAPI says it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flawmap.service.batching import Answer
from flawmap.service.hosting import Host
from flawmap.service.journal import inspection_json
from flawmap.service.records import iso
from flawmap.service.tables import InspectionRow, ThresholdRow, WordRow

Word = Literal["good", "defect", "unsure"]
Verdict = Literal["good", "defect", "unsure", "error"]


class Problem(BaseModel):
    """Why something was refused, in one line."""

    detail: str


class Region(BaseModel):
    """A part of the map at or above the pixel threshold.

    `box` is (left, top, right, bottom) in pixels of the picture, right and bottom exclusive; `peak` is in the method's
    units.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float


class Links(BaseModel):
    """Where the pictures of an inspection are; null where they are not kept."""

    picture: str | None
    overlay: str | None
    map: str | None


class Inspection(BaseModel):
    """One image that was judged.

    `score` is in the method's units, higher is more abnormal; `p_value` is the share of good parts expected to score
    as high. `threshold_version` 0 is the threshold of training. `word` is the operator's last.
    """

    id: int
    at: datetime
    model: str
    model_digest: str
    threshold_version: int
    source: str
    name: str
    image_digest: str
    width: int | None
    height: int | None
    verdict: Verdict
    score: float | None
    p_value: float | None
    threshold: float | None
    regions: list[Region]
    error: str | None
    milliseconds: float
    word: Word | None
    word_by: str | None
    word_at: datetime | None
    links: Links

    @classmethod
    def of(cls, row: InspectionRow) -> Inspection:
        """As it was kept."""
        base = f"/v1/inspections/{row.id}"
        links = {
            "picture": f"{base}/picture" if row.picture else None,
            "overlay": f"{base}/overlay" if row.picture and row.map else None,
            "map": f"{base}/map" if row.map else None,
        }
        return cls.model_validate({**inspection_json(row), "links": links})


class Inspections(BaseModel):
    """What came of the images of one request, in their order."""

    inspections: list[Inspection]

    @classmethod
    def of(cls, answer: Answer) -> Inspections:
        """As they were kept."""
        return cls(inspections=[Inspection.of(row) for row in answer.rows])


class Listed(Inspections):
    """Inspections, newest first; `next` is the cursor of those that follow, null at the end."""

    next: int | None


class Said(BaseModel):
    """An operator's word, who gave it and when."""

    word: Word
    by: str
    at: datetime

    @classmethod
    def of(cls, row: WordRow) -> Said:
        """As it was kept."""
        return cls.model_validate({"word": row.word, "by": row.by, "at": iso(row.at)})


class WordGiven(BaseModel):
    """What an operator says of an inspection."""

    model_config = ConfigDict(extra="forbid", strict=True)

    word: Word


def _one_of_two(schema: dict[str, Any]) -> None:
    """Either of the properties, and neither of them null."""
    for name, kept in schema["properties"].items():
        number = next(choice for choice in kept.pop("anyOf") if choice.get("type") == "number")
        schema["properties"][name] = {**number, "title": kept["title"]}
    schema["oneOf"] = [{"required": [name]} for name in schema["properties"]]


class ThresholdGiven(BaseModel):
    """A new threshold: either the share of good parts that it may reject, or its value in the method's units."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_one_of_two)

    rate: float | None = Field(default=None, gt=0, lt=1)
    value: float | None = Field(default=None, ge=-3e38, le=3e38)

    @model_validator(mode="after")
    def _one(self) -> ThresholdGiven:
        if (self.rate is None) == (self.value is None):
            raise ValueError("give either a rate or a value")
        return self


class Threshold(BaseModel):
    """A threshold that is in use, or was.

    `rate` is the false-reject rate that it was set to keep, null where its value was given; `describe` says what it
    promises.
    """

    version: int
    value: float
    rate: float | None
    model_digest: str
    by: str | None
    at: datetime | None
    describe: str | None

    @classmethod
    def of(cls, host: Host, row: ThresholdRow | None = None) -> Threshold:
        """The one in use, or one of the records."""
        serving = host.serving
        if row is None or row.version == serving.version:
            used = serving.inspector.judge.threshold
            assert used is not None
            return cls(
                version=serving.version,
                value=used.value,
                rate=serving.rate,
                model_digest=serving.inspector.digest or "",
                by=None if row is None else row.by,
                at=None if row is None else datetime.fromisoformat(iso(row.at) or ""),
                describe=serving.inspector.judge.describe(),
            )
        kept = {"version": row.version, "value": row.value, "rate": row.rate, "model_digest": row.model_digest}
        return cls.model_validate({**kept, "by": row.by, "at": iso(row.at), "describe": None})


class Thresholds(BaseModel):
    """All versions that were set, oldest first."""

    thresholds: list[Threshold]


class Model(BaseModel):
    """A model that is served; `trouble` says why a newer file of it is not in use."""

    name: str
    digest: str
    method: str
    backbone: str
    image_size: list[int]
    localises: bool
    threshold: Threshold
    trouble: str | None

    @classmethod
    def of(cls, host: Host) -> Model:
        """As it is served now."""
        inspector = host.serving.inspector
        return cls(
            name=host.name,
            digest=inspector.digest or "",
            method=inspector.card.method,
            backbone=inspector.card.backbone,
            image_size=list(inspector.card.preparation.image_size),
            localises=inspector.card.localises,
            threshold=Threshold.of(host),
            trouble=host.trouble,
        )


class Models(BaseModel):
    """All models that are served."""

    models: list[Model]


class Health(BaseModel):
    """Whether the service works; `trouble` says what does not."""

    ready: bool
    trouble: list[str]
