"""One door to the catalogue's database: opening and migrating it, transactions that read, transactions that write.

SQLite in the home folder or any PostgreSQL URL. On both, only one write transaction runs at a time: a writer may look
first and then write, and nobody has come between.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError

from . import schema
from .errors import CatalogError

PATIENCE = 60.0  # seconds to wait for another process' transaction
_PACKAGE = __package__.partition(".")[0]
_VERSION_TABLE = f"{_PACKAGE}_version"
_WRITER_LOCK = 0x10A_AB  # any number, the same for all writers to one PostgreSQL database


class Database:
    """The open, up-to-date database of the catalogue in `home` (a folder, created if missing).

    Raises CatalogError if the folder or the database cannot be opened, or was made by a newer version.
    """

    def __init__(self, home: Path, url: str | None = None) -> None:
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CatalogError(f"{home}: the catalogue's folder cannot be made: {error.strerror}") from error
        address = _address(home, url)
        self.label = address.render_as_string(hide_password=True) if url else str(address.database)
        self.engine = _engine(address)
        self.dialect = self.engine.dialect.name
        try:
            self._bring_up_to_date(home)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database."""
        with self._errors(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that no other writer's overlaps; commits on leaving, rolls back on any exception."""
        with self._errors(), self.engine.connect() as connection:
            writing = connection.execution_options(writing=True)
            with writing.begin():
                if self.dialect == "postgresql":
                    writing.execute(text(f"SET LOCAL lock_timeout = '{PATIENCE:.0f}s'"))
                    writing.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITER_LOCK})
                yield writing

    def insert(self, table: Table) -> Any:
        """The dialect's `insert`, the one that knows `on_conflict_do_nothing` and `on_conflict_do_update`."""
        if self.dialect == "postgresql":
            from sqlalchemy.dialects import postgresql

            return postgresql.insert(table)
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the world does to a database (locked, full, damaged, gone) in our words; a wrong query stays a bug."""
        try:
            yield
        except DatabaseError as error:
            if isinstance(error, OperationalError) or type(error) is DatabaseError:
                raise CatalogError(f"{self.label}: the catalogue's database failed: {_cause(error)}") from error
            raise

    def _bring_up_to_date(self, home: Path) -> None:
        if self._recorded() == schema.NEWEST:
            return
        from filelock import FileLock, Timeout

        try:
            with FileLock(home / f"{_PACKAGE}.lock", timeout=PATIENCE):
                recorded = self._recorded()  # another process may have done it meanwhile
                if recorded is not None and recorded > schema.NEWEST:
                    raise CatalogError(
                        f"{self.label}: made by a newer version (tables {recorded}, this one knows up to "
                        f"{schema.NEWEST}); update {_PACKAGE}"
                    )
                if recorded != schema.NEWEST:
                    with self.write() as connection:
                        migrate(connection)
        except Timeout as error:
            raise CatalogError(f"{home}: another process has held the catalogue for {PATIENCE:.0f} s") from error

    def _recorded(self) -> str | None:
        """The migration that the database is at; None when it is empty."""
        with self.read() as connection:
            if not self.engine.dialect.has_table(connection, _VERSION_TABLE):
                return None
            return connection.execute(text(f"SELECT version_num FROM {_VERSION_TABLE}")).scalar()


def migrate(connection: Connection) -> None:
    """Run the migrations that the database lacks, in the caller's transaction."""
    from alembic import command

    command.upgrade(migration_config(connection), "head")


def migration_config(connection: Connection) -> Any:
    """Alembic's configuration for our migrations on `connection`."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(connection=connection, metadata=schema.metadata, version_table=_VERSION_TABLE)
    return config


def _address(home: Path, url: str | None) -> URL:
    if url is None:
        return URL.create("sqlite", database=str(home / f"{_PACKAGE}.db"))
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise CatalogError(f"{url!r} is no database URL; expected something like postgresql+psycopg://...") from error
    if address.get_backend_name() not in ("sqlite", "postgresql"):
        raise CatalogError(f"{address.drivername!r} databases are not supported; use sqlite or postgresql+psycopg")
    return address


def _engine(address: URL) -> Engine:
    if address.get_backend_name() == "postgresql":
        try:
            return create_engine(address)
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            raise CatalogError(f"PostgreSQL needs a driver: {error}; install the extra 'postgres'") from error
    engine = create_engine(address, connect_args={"timeout": PATIENCE})
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin or commit on its own: _on_begin does
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _write_ahead(connection: Any) -> None:
    """Switch to write-ahead logging; SQLite does not wait by itself when another process is just doing the same."""
    import sqlite3

    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _on_begin(connection: Connection) -> None:
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _cause(error: DatabaseError) -> str:
    return " ".join(str(error.orig or error).split())
