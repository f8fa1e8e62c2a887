"""The tables of the records: inspections, the operators' words on them, thresholds, what was seen, what is to be told.

Times are whole milliseconds since 1970, UTC, which every database keeps alike.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite numbers rows by themselves in a column of exactly this type.
_Number = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """What the migrations make."""


class RequestRow(Base):
    """A request that bore an Idempotency-Key, kept with its inspections in one transaction.

    Attributes:
        owner: the name of the key that asked; empty without keys.
        key: the Idempotency-Key.
        digest: SHA-256 of what was asked: another body under the same key is refused.
    """

    __tablename__ = "requests"
    __table_args__ = (UniqueConstraint("owner", "key"),)

    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    owner: Mapped[str] = mapped_column(String(100))
    key: Mapped[str] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(String(64))
    at: Mapped[int] = mapped_column(BigInteger)


class InspectionRow(Base):
    """One image that was judged.

    Attributes:
        model, model_digest: the model's name, and the digest of its file.
        threshold_version: 0 for the threshold of training, else `ThresholdRow.version`.
        source: "api", "page", or what `watch` looked at.
        name: what whoever sent it calls it. It names no file here.
        image_digest: SHA-256 of the bytes that were judged.
        statistics: of the capture, in the order of `flawmap.imaging.captures.STATISTICS`.
        picture, map: names of files below the pictures' folder; None where they are not kept.
        stored: bytes of the two.
        word, word_by, word_at: the operator's last.
    """

    __tablename__ = "inspections"
    __table_args__ = (
        Index("inspections_by_model", "model", "id"),
        Index("inspections_by_verdict", "verdict", "id"),
        Index("inspections_by_time", "at"),
        Index("inspections_by_picture", "picture"),
        Index("inspections_by_map", "map"),
    )

    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    at: Mapped[int] = mapped_column(BigInteger)
    model: Mapped[str] = mapped_column(String(100))
    model_digest: Mapped[str] = mapped_column(String(64))
    threshold_version: Mapped[int] = mapped_column(Integer)
    source: Mapped[str] = mapped_column(String(200))
    name: Mapped[str] = mapped_column(String(300))
    owner: Mapped[str] = mapped_column(String(100))
    request: Mapped[int | None] = mapped_column(ForeignKey("requests.id"), index=True)
    image_digest: Mapped[str] = mapped_column(String(64))
    width: Mapped[int | None] = mapped_column(Integer)
    height: Mapped[int | None] = mapped_column(Integer)
    verdict: Mapped[str] = mapped_column(String(10))
    score: Mapped[float | None] = mapped_column(Float(53))
    p_value: Mapped[float | None] = mapped_column(Float(53))
    threshold: Mapped[float | None] = mapped_column(Float(53))
    regions: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    error: Mapped[str | None] = mapped_column(Text)
    milliseconds: Mapped[float] = mapped_column(Float(53))
    statistics: Mapped[list[float] | None] = mapped_column(JSON(none_as_null=True))
    picture: Mapped[str | None] = mapped_column(String(80))
    map: Mapped[str | None] = mapped_column(String(80))
    stored: Mapped[int] = mapped_column(BigInteger)
    word: Mapped[str | None] = mapped_column(String(10))
    word_by: Mapped[str | None] = mapped_column(String(100))
    word_at: Mapped[int | None] = mapped_column(BigInteger)


class WordRow(Base):
    """What an operator said of an inspection. None is ever changed: the last one counts."""

    __tablename__ = "words"

    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    inspection: Mapped[int] = mapped_column(ForeignKey("inspections.id"), index=True)
    word: Mapped[str] = mapped_column(String(10))
    by: Mapped[str] = mapped_column(String(100))
    at: Mapped[int] = mapped_column(BigInteger)


class ThresholdRow(Base):
    """A threshold that someone set, by a false-reject rate or by its value. None is changed: the last counts."""

    __tablename__ = "thresholds"
    __table_args__ = (UniqueConstraint("model", "version"),)

    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    model: Mapped[str] = mapped_column(String(100))
    version: Mapped[int] = mapped_column(Integer)
    model_digest: Mapped[str] = mapped_column(String(64))
    rate: Mapped[float | None] = mapped_column(Float(53))
    value: Mapped[float] = mapped_column(Float(53))
    by: Mapped[str] = mapped_column(String(100))
    at: Mapped[int] = mapped_column(BigInteger)


class SeenRow(Base):
    """A file that `watch` has judged, with what tells that it is still the same."""

    __tablename__ = "seen"
    __table_args__ = (UniqueConstraint("source", "name", "size", "changed"),)

    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    source: Mapped[str] = mapped_column(String(500))
    name: Mapped[str] = mapped_column(String(500))
    size: Mapped[int] = mapped_column(BigInteger)
    changed: Mapped[int] = mapped_column(BigInteger)
    inspection: Mapped[int | None] = mapped_column(ForeignKey("inspections.id"))


class DeliveryRow(Base):
    """An inspection that a webhook is to be told of.

    Attributes:
        state: "waiting", "done", or "dead" when it was tried as often as it is.
        due: when it is tried next.
    """

    __tablename__ = "deliveries"
    __table_args__ = (Index("deliveries_due", "state", "due"),)

    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    inspection: Mapped[int] = mapped_column(ForeignKey("inspections.id"))
    url: Mapped[str] = mapped_column(String(1000))
    state: Mapped[str] = mapped_column(String(10))
    tries: Mapped[int] = mapped_column(Integer)
    due: Mapped[int] = mapped_column(BigInteger)
    error: Mapped[str | None] = mapped_column(Text)


class JobRow(Base):
    """A training that was started from the page.

    Attributes:
        state: "running", "done", "failed" or "cancelled".
        data: the folder of good images, below the folder that may be trained from.
        folder: where the job keeps its model, report and output.
        command: what is run, without the program.
    """

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(_Number, primary_key=True)
    at: Mapped[int] = mapped_column(BigInteger)
    by: Mapped[str] = mapped_column(String(100))
    state: Mapped[str] = mapped_column(String(10))
    data: Mapped[str] = mapped_column(String(1000))
    folder: Mapped[str] = mapped_column(String(1000))
    command: Mapped[list[str]] = mapped_column(JSON)
    process: Mapped[int | None] = mapped_column(Integer)
    message: Mapped[str | None] = mapped_column(Text)
