"""What was inspected, what operators said of it, and under which threshold: in the database, never half."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from flawmap.service.database import asking, now
from flawmap.service.tables import (
    DeliveryRow,
    InspectionRow,
    JobRow,
    RequestRow,
    SeenRow,
    ThresholdRow,
    WordRow,
)

WORDS = ("good", "defect", "unsure")


class RepeatedError(Exception):
    """Another process has committed the same request, or judged the same file, in the meantime."""


@dataclass(frozen=True)
class Asked:
    """What makes a request safe to be made again.

    Attributes:
        owner: who asks.
        key: the Idempotency-Key.
        digest: SHA-256, in hexadecimal, of what is asked.
    """

    owner: str
    key: str
    digest: str


@dataclass(frozen=True)
class Seen:
    """A file below a watched source, with what tells whether it is still the same; `changed` in nanoseconds."""

    source: str
    name: str
    size: int
    changed: int


@dataclass(frozen=True)
class Filter:
    """Which inspections: by model, verdict, operator's word, time (`since` inclusive, `until` exclusive, in
    milliseconds) and number (`before` exclusive). None is no limit; `worded` asks for any word, or none."""

    model: str | None = None
    verdict: str | None = None
    word: str | None = None
    worded: bool | None = None
    since: int | None = None
    until: int | None = None
    before: int | None = None
    after: int | None = None

    def apply(self, query: Any) -> Any:
        """The query with these limits."""
        row = InspectionRow
        for limit, condition in (
            (self.model, row.model == self.model),
            (self.verdict, row.verdict == self.verdict),
            (self.word, row.word == self.word),
            (self.since, row.at >= (self.since or 0)),
            (self.until, row.at < (self.until or 0)),
            (self.before, row.id < (self.before or 0)),
            (self.after, row.id > (self.after or 0)),
        ):
            if limit is not None:
                query = query.where(condition)
        if self.worded is not None:
            query = query.where(row.word.is_not(None) if self.worded else row.word.is_(None))
        return query


class Records:
    """Each method is one transaction, and may be called from any thread.

    All of them raise DatabaseGoneError, see `flawmap.service.database`, where the database cannot be asked.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @asking
    def ping(self) -> None:
        """Asks the database for nothing."""
        with self._session() as session:
            session.execute(select(1))

    # Inspections

    @asking
    def add(
        self,
        rows: Sequence[Mapping[str, Any]],
        asked: Asked | None = None,
        seen: Sequence[Seen] = (),
        deliveries: Sequence[str] = (),
    ) -> list[InspectionRow]:
        """Keeps inspections, all or none of them.

        Args:
            rows: values of `InspectionRow`, without `id` and `request`.
            asked: the request that they answer, if it may be made again.
            seen: the files that they are of, one for each row, or none at all.
            deliveries: URLs of webhooks that are to be told of each of them, see `flawmap.service.deliveries`.

        Returns:
            The rows as they were kept, in their order.

        Raises:
            RepeatedError: the request, or one of the files, is there already.
        """
        with self._session() as session:
            try:
                request = None
                if asked is not None:
                    kept = RequestRow(owner=asked.owner, key=asked.key, digest=asked.digest, at=now())
                    session.add(kept)
                    session.flush()
                    request = kept.id
                added = [InspectionRow(**row, request=request) for row in rows]
                for one in added:  # in order: numbers are what lists are sorted by
                    session.add(one)
                    session.flush()
                for one, file in zip(added, seen, strict=False):
                    session.add(
                        SeenRow(
                            source=file.source,
                            name=file.name,
                            size=file.size,
                            changed=file.changed,
                            inspection=one.id,
                        )
                    )
                for one in added:
                    for url in deliveries:
                        session.add(
                            DeliveryRow(inspection=one.id, url=url, state="waiting", tries=0, due=one.at, error=None)
                        )
                session.commit()
            except IntegrityError as error:
                raise RepeatedError from error
            return added

    @asking
    def answered(self, owner: str, key: str) -> tuple[str, list[InspectionRow]] | None:
        """The digest of a request that was answered under a key, and its inspections; None where there was none."""
        with self._session() as session:
            found = session.scalar(select(RequestRow).where(RequestRow.owner == owner, RequestRow.key == key))
            if found is None:
                return None
            rows = session.scalars(select(InspectionRow).where(InspectionRow.request == found.id))
            return found.digest, sorted(rows, key=lambda row: row.id)

    @asking
    def get(self, number: int) -> InspectionRow | None:
        """One inspection."""
        with self._session() as session:
            return session.get(InspectionRow, number)

    @asking
    def latest(self, which: Filter, limit: int) -> list[InspectionRow]:
        """At most `limit` inspections, newest first."""
        with self._session() as session:
            query = which.apply(select(InspectionRow)).order_by(InspectionRow.id.desc()).limit(limit)
            return list(session.scalars(query))

    def each(self, which: Filter, block: int = 1000) -> Iterator[InspectionRow]:
        """All of them, oldest first, a block at a time: the database is not held while the caller is slow."""
        after = which.after or 0
        while True:
            rows = self._block(which, after, block)
            yield from rows
            if len(rows) < block:
                return
            after = rows[-1].id

    @asking
    def _block(self, which: Filter, after: int, limit: int) -> list[InspectionRow]:
        with self._session() as session:
            query = which.apply(select(InspectionRow)).where(InspectionRow.id > after)
            return list(session.scalars(query.order_by(InspectionRow.id).limit(limit)))

    @asking
    def counts(self, which: Filter) -> dict[str, int]:
        """How many of each verdict."""
        with self._session() as session:
            query = which.apply(select(InspectionRow.verdict, func.count())).group_by(InspectionRow.verdict)
            return {str(verdict): int(count) for verdict, count in session.execute(query)}

    # Words

    @asking
    def say(self, number: int, word: str, by: str) -> InspectionRow | None:
        """Keeps an operator's word on an inspection; None where there is no such inspection."""
        at = now()
        with self._session() as session:
            row = session.get(InspectionRow, number, with_for_update=True)
            if row is None:
                return None
            session.add(WordRow(inspection=number, word=word, by=by, at=at))
            row.word, row.word_by, row.word_at = word, by, at
            session.commit()
            return row

    @asking
    def words(self, number: int) -> list[WordRow]:
        """All that was said of an inspection, oldest first."""
        with self._session() as session:
            query = select(WordRow).where(WordRow.inspection == number).order_by(WordRow.id)
            return list(session.scalars(query))

    # Thresholds

    @asking
    def set_threshold(self, model: str, digest: str, value: float, rate: float | None, by: str) -> ThresholdRow:
        """Keeps a new version of a model's threshold."""
        for _ in range(10):
            with self._session() as session:
                last = session.scalar(select(func.max(ThresholdRow.version)).where(ThresholdRow.model == model))
                row = ThresholdRow(
                    model=model,
                    version=(last or 0) + 1,
                    model_digest=digest,
                    rate=rate,
                    value=value,
                    by=by,
                    at=now(),
                )
                session.add(row)
                try:
                    session.commit()
                except IntegrityError:  # another process was quicker
                    continue
                return row
        raise RepeatedError

    @asking
    def thresholds(self, model: str) -> list[ThresholdRow]:
        """All versions of a model's threshold, oldest first."""
        with self._session() as session:
            query = select(ThresholdRow).where(ThresholdRow.model == model).order_by(ThresholdRow.version)
            return list(session.scalars(query))

    # Trainings

    @asking
    def add_job(self, data: str, folder: str, command: Sequence[str], by: str) -> JobRow:
        """Keeps a training that is about to run."""
        with self._session() as session:
            row = JobRow(at=now(), by=by, state="running", data=data, folder=folder, command=list(command))
            session.add(row)
            session.commit()
            return row

    @asking
    def change_job(self, number: int, **values: Any) -> JobRow | None:
        """Keeps what became of a training that runs: None, and nothing is changed, where it does not run any more."""
        with self._session() as session:
            row = session.get(JobRow, number, with_for_update=True)
            if row is None or row.state != "running":
                return None
            for name, value in values.items():
                setattr(row, name, value)
            session.commit()
            return row

    @asking
    def job(self, number: int) -> JobRow | None:
        """One training."""
        with self._session() as session:
            return session.get(JobRow, number)

    @asking
    def jobs(self, limit: int) -> list[JobRow]:
        """The last trainings, newest first."""
        with self._session() as session:
            return list(session.scalars(select(JobRow).order_by(JobRow.id.desc()).limit(limit)))

    # Watched files

    @asking
    def was_seen(self, files: Sequence[Seen]) -> list[bool]:
        """Which of some files of one source were judged, as they are now."""
        found: set[tuple[str, int, int]] = set()
        with self._session() as session:
            for start in range(0, len(files), 500):
                some = files[start : start + 500]
                query = select(SeenRow.name, SeenRow.size, SeenRow.changed).where(
                    SeenRow.source == some[0].source, SeenRow.name.in_([file.name for file in some])
                )
                found |= {(name, size, changed) for name, size, changed in session.execute(query)}
        return [(file.name, file.size, file.changed) in found for file in files]

    @asking
    def verdict_of(self, file: Seen) -> str | None:
        """The verdict on a file as it is now; None where it was not judged."""
        with self._session() as session:
            query = select(InspectionRow.verdict).join(SeenRow, SeenRow.inspection == InspectionRow.id)
            return session.scalar(
                query.where(
                    SeenRow.source == file.source,
                    SeenRow.name == file.name,
                    SeenRow.size == file.size,
                    SeenRow.changed == file.changed,
                )
            )

    # Pictures

    @asking
    def stored(self) -> int:
        """Bytes of all pictures and maps that are kept; of a file that several inspections share, as often."""
        with self._session() as session:
            return int(session.scalar(select(func.coalesce(func.sum(InspectionRow.stored), 0))) or 0)

    @asking
    def disposable(self, limit: int) -> list[InspectionRow]:
        """Inspections whose pictures may go first: the oldest good ones, then the oldest of all."""
        with self._session() as session:
            kept = select(InspectionRow).where(InspectionRow.stored > 0).order_by(InspectionRow.id).limit(limit)
            good = list(session.scalars(kept.where(InspectionRow.verdict == "good")))
            return good or list(session.scalars(kept))

    @asking
    def drop_pictures(self, numbers: Sequence[int]) -> list[str]:
        """Lets go of the pictures of some inspections; the names of the files that none needs any more."""
        with self._session() as session:
            rows = list(session.scalars(select(InspectionRow).where(InspectionRow.id.in_(numbers))))
            names = {name for row in rows for name in (row.picture, row.map) if name is not None}
            session.execute(
                update(InspectionRow)
                .where(InspectionRow.id.in_(numbers))
                .values(picture=None, map=None, stored=0)
                .execution_options(synchronize_session=False)
            )
            session.commit()
            used = set()
            for column in (InspectionRow.picture, InspectionRow.map):
                used |= set(session.scalars(select(column).where(column.in_(names))))
            return sorted(names - used)

    def _session(self) -> Session:
        return Session(self.engine, expire_on_commit=False)


def iso(milliseconds: int | None) -> str | None:
    """A time of the records as ISO 8601, UTC."""
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="milliseconds")
