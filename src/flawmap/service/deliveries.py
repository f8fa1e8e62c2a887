"""What webhooks are still to be told: rows that were committed with their inspections, each taken by one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select, update
from sqlalchemy.engine import CursorResult, Engine
from sqlalchemy.orm import Session

from flawmap.service.database import asking, now
from flawmap.service.tables import DeliveryRow, InspectionRow


@dataclass(frozen=True)
class Claimed:
    """A delivery that is tried now, for the `tries`-th time, and its inspection."""

    id: int
    url: str
    tries: int
    inspection: InspectionRow


class Deliveries:
    """Each method is one transaction, and may be called from any thread or process.

    All of them raise DatabaseGoneError, see `flawmap.service.database`, where the database cannot be asked.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @asking
    def claim(self, urls: Sequence[str], lease: int) -> Claimed | None:
        """Takes the delivery to one of some URLs that has been due for the longest; None where none is due.

        Args:
            urls: of whoever asks.
            lease: milliseconds after which it is due again, should whoever took it be killed.
        """
        while True:
            with self._session() as session:
                at = now()
                row = session.scalar(
                    select(DeliveryRow)
                    .where(DeliveryRow.state == "waiting", DeliveryRow.due <= at, DeliveryRow.url.in_(urls))
                    .order_by(DeliveryRow.due, DeliveryRow.id)
                    .limit(1)
                )
                if row is None:
                    return None
                id, url, tries, due = row.id, row.url, row.tries, row.due
                inspection = session.get(InspectionRow, row.inspection)
                taken = session.execute(
                    update(DeliveryRow)
                    .where(DeliveryRow.id == id, DeliveryRow.state == "waiting", DeliveryRow.due == due)
                    .values(due=at + lease, tries=tries + 1)
                    .execution_options(synchronize_session=False)
                )
                session.commit()
                assert isinstance(taken, CursorResult)
                if taken.rowcount and inspection is not None:  # else another process was quicker
                    return Claimed(id, url, tries + 1, inspection)

    def done(self, number: int) -> None:
        """It has arrived."""
        self._change(number, state="done", error=None)

    def failed(self, number: int, error: str, due: int | None) -> None:
        """It has not arrived: tried again when it is `due`, or never, with None."""
        state = "dead" if due is None else "waiting"
        self._change(number, state=state, error=error, **({} if due is None else {"due": due}))

    @asking
    def due_next(self, urls: Sequence[str]) -> int | None:
        """When a delivery to one of some URLs is due next; None where none waits."""
        with self._session() as session:
            query = select(func.min(DeliveryRow.due)).where(DeliveryRow.state == "waiting")
            return session.scalar(query.where(DeliveryRow.url.in_(urls)))

    @asking
    def dead(self) -> list[DeliveryRow]:
        """The deliveries that were given up, oldest first."""
        with self._session() as session:
            return list(
                session.scalars(select(DeliveryRow).where(DeliveryRow.state == "dead").order_by(DeliveryRow.id))
            )

    @asking
    def retry_dead(self) -> list[DeliveryRow]:
        """Makes the deliveries that were given up due again, as if they had never been tried; which ones they are."""
        with self._session() as session:
            query = select(DeliveryRow).where(DeliveryRow.state == "dead").order_by(DeliveryRow.id)
            rows = list(session.scalars(query))
            for row in rows:
                row.state, row.tries, row.due = "waiting", 0, now()
            session.commit()
            return rows

    @asking
    def _change(self, number: int, **values: object) -> None:
        with self._session() as session:
            session.execute(update(DeliveryRow).where(DeliveryRow.id == number).values(**values))
            session.commit()

    def _session(self) -> Session:
        return Session(self.engine, expire_on_commit=False)
