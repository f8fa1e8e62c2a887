"""The database of the records: SQLite in a file, or PostgreSQL; opened, brought up to date, and asked for again."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from flawmap.errors import FlawmapError

P = ParamSpec("P")
T = TypeVar("T")

_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 5_741_230_117  # of PostgreSQL, for whoever migrates
_BUSY = 15  # seconds that SQLite waits for another writer


class DatabaseGoneError(FlawmapError):
    """The database cannot be reached now, or cannot write; it may be back later."""


class DatabaseFullError(DatabaseGoneError):
    """The database's disk is full."""


def now() -> int:
    """Milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def asking(do: Callable[P, T]) -> Callable[P, T]:
    """A function that asks something of the database, such that its failures are told as:

    Raises:
        DatabaseFullError: its disk is full.
        DatabaseGoneError: it cannot be reached, or is locked for too long.
    """

    @wraps(do)
    def asked(*arguments: P.args, **more: P.kwargs) -> T:
        try:
            return do(*arguments, **more)
        except (OperationalError, PoolTimeoutError) as error:
            raise _gone(error) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise _gone(error) from error
            raise

    return asked


def open_database(url: str) -> Engine:
    """The database at a URL, with the tables of this version.

    Args:
        url: `sqlite:///records.db`, or `postgresql://user:password@host/name`.

    Raises:
        FlawmapError: it is no such URL, or the database is of a newer version.
        DatabaseGoneError: it cannot be reached.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise FlawmapError("--database is no URL: give sqlite:///FILE or postgresql://USER@HOST/NAME") from error
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise FlawmapError(f"--database of {kind}: give sqlite:///FILE or postgresql://USER@HOST/NAME")
    if kind == "postgresql" and parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    options: dict[str, Any] = {"pool_pre_ping": True}
    if kind == "sqlite":
        options["connect_args"] = {"timeout": _BUSY}
    else:
        options |= {"connect_args": {"connect_timeout": 5}, "pool_timeout": 5, "pool_size": 5, "max_overflow": 5}
    try:
        engine = create_engine(parsed, **options)
    except (ImportError, NoSuchModuleError) as error:
        raise FlawmapError(f"a database of {kind} needs its driver: pip install 'flawmap[serve]'") from error
    if kind == "sqlite":
        event.listen(engine, "connect", _sqlite)
    _migrate(engine)
    return engine


def _sqlite(connection: Any, record: Any) -> None:
    """Readers do not wait for the writer, and what is committed is on the disk, power cuts included."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


@asking
def _migrate(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with engine.connect() as connection:
        _one_at_a_time(connection)
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise FlawmapError("the database was made by a newer flawmap: upgrade flawmap") from error
        connection.commit()


def _one_at_a_time(connection: Connection) -> None:
    """Two processes that start on one database migrate one after the other."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def _gone(error: SQLAlchemyError) -> DatabaseGoneError:
    told = str(getattr(error, "orig", None) or error).lower()
    if "disk is full" in told or "no space left" in told or "disk full" in told:
        return DatabaseFullError("the disk of the database is full: free some space")
    if "readonly" in told or "unable to open" in told or "i/o error" in told:
        return DatabaseGoneError("the database cannot be written: check its folder, its permissions and its disk")
    return DatabaseGoneError("the database cannot be reached: check that it runs, and --database")
