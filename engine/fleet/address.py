"""Reaching the fleet's database: its address, its connections, and what goes wrong, told without the password."""

import re
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from limpet.schema.errors import FleetError, InvalidInputError, quote
from limpet.schema.protobuf_json import is_text

CONNECT_SECONDS = 5
STATEMENT_SECONDS = 30
_SCHEMES = ("postgresql+psycopg", "postgresql", "postgres")
_SHOWN = ("host", "hostaddr", "port", "dbname", "user")
_IDLE_SECONDS = 10.0
"""So long may a transaction stand still. A node that vanished amid one would else hold its lock for hours."""
_SILENT_SECONDS = 60.0
"""So long may the server say nothing to a statement, which it cancels sooner unless it hangs: stopped, or at its disk.

Its kernel still acknowledges then, so no other timeout ends it, and another server may have been promoted long since.
"""
_SCHEMA = "limpet"
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_NOT_REPLICATED = "01000"
"""The SQLSTATE of the warning that a commit has not waited for its synchronous standby."""

_SETTINGS = """
SELECT set_config('search_path', %(schema)s, %(is_local)s),
    set_config('statement_timeout', %(statement)s, %(is_local)s),
    set_config('idle_in_transaction_session_timeout', %(idle)s, %(is_local)s),
    set_config('tcp_keepalives_idle', '10', %(is_local)s), set_config('tcp_keepalives_interval', '5', %(is_local)s),
    set_config('tcp_keepalives_count', '4', %(is_local)s),
    set_config('lock_timeout', '0', %(is_local)s), set_config('standard_conforming_strings', 'on', %(is_local)s),
    set_config('array_nulls', 'on', %(is_local)s), set_config('quote_all_identifiers', 'off', %(is_local)s),
    set_config('default_transaction_isolation', 'read committed', %(is_local)s),
    set_config('client_min_messages', 'warning', %(is_local)s),
    CASE WHEN current_setting('idle_session_timeout', true) <> '' THEN
        set_config('idle_session_timeout', '0', %(is_local)s) END,
    CASE WHEN current_setting('transaction_timeout', true) <> '' THEN
        set_config('transaction_timeout', '0', %(is_local)s) END,
    set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply'
        ELSE 'on' END, %(is_local)s)
WHERE %(is_local)s OR pg_backend_pid() = %(pid)s"""
"""Of a session, or of a transaction. A pooler tells its clients process ids of its own; then this sets nothing.

A role or a database may have settings of its own. What is told to be in the fleet is durable there whatever they say,
and a commit that has not waited for its standby is told, as a warning.
"""
_ENCODINGS = {"UTF8", "SQL_ASCII"}
"""Of databases that hold any text."""
_HINTS = {
    "42P01": "; was it dropped, or the right to use its schema taken away?",
    "42883": "; was it dropped from the fleet's schema by hand? Whoever connects anew does without, and the"
    " log tells what to do",
    "25006": "; is it a standby? Give the primary, or target_session_attrs=read-write with several hosts. Or has the"
    " user default_transaction_read_only?",
}
"""What to do, by the SQLSTATE of errors that do not tell."""


class Connection(psycopg.Connection[Any]):
    """A connection that may lead to a pooler, such as pgbouncer: that may give each transaction another session.

    What is set there would be found by whoever has it next. So each transaction then has settings of its own.
    """

    _settings: Mapping[str, object] | None = None
    """What each transaction sets; None if the session is this connection's own."""
    _depth = 0
    is_patient = False
    """True if statements may take as long as they take."""

    def begin(self, schema: str) -> None:
        """Set what all that follows needs."""
        settings = {
            "schema": schema,
            "statement": f"{1000 * STATEMENT_SECONDS:.0f}ms",
            "idle": f"{1000 * _IDLE_SECONDS:.0f}ms",
            "pid": self.info.backend_pid,
        }
        if self.execute(_SETTINGS, {**settings, "is_local": False}).fetchone() is None:
            self.prepare_threshold = None  # what is prepared stays with the session, too
            self._settings = {**settings, "is_local": True}

    def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
        """Wait for what psycopg waits for, unless the server says nothing for too long."""
        return super().wait(gen if self.is_patient else self._until_silent(gen), *arguments, **options)

    def _until_silent(self, generator: Any) -> Generator[Any, Any, Any]:
        heard = time.monotonic()
        try:
            wanted = next(generator)
            while True:
                ready = yield wanted
                now = time.monotonic()
                if ready:
                    heard = now
                elif now - heard > _SILENT_SECONDS:
                    self._give_up()
                    raise psycopg.OperationalError(f"the server has said nothing for {_SILENT_SECONDS:g} s")
                wanted = generator.send(ready)
        except StopIteration as stop:
            return stop.value

    def _give_up(self) -> None:
        """Close this, and have the server end what it is at: it looks for nobody while it waits for a standby."""
        if psycopg.capabilities.has_cancel_safe():
            with suppress(psycopg.Error):
                self.cancel_safe(timeout=CONNECT_SECONDS)
        self.close()

    @property
    def is_pooled(self) -> bool:
        """True if the session may be another one in each transaction."""
        return self._settings is not None

    def set_locally(self) -> None:
        """At the beginning of a transaction: set what it needs, if the session cannot have it."""
        if self._settings is not None:
            super().execute(_SETTINGS, self._settings)

    @contextmanager
    def transaction(self, *arguments: Any, **options: Any) -> "Iterator[psycopg.Transaction]":
        """Run the block in a transaction, or in part of one."""
        with super().transaction(*arguments, **options) as transaction:
            self._depth += 1
            try:
                if self._depth == 1:
                    self.set_locally()
                yield transaction
            finally:
                self._depth -= 1

    def execute(self, *arguments: Any, **options: Any) -> "psycopg.Cursor[Any]":
        """Execute a statement; outside a transaction, in one of its own."""
        if self._settings is None or self._depth or not self.autocommit:
            return super().execute(*arguments, **options)
        with self.transaction():
            return super().execute(*arguments, **options)


class Address:
    """Where the fleet is. Its text never shows a password."""

    def __init__(self, url: str) -> None:
        """Raise InvalidInputError for what is no address of a PostgreSQL."""
        # Nothing that is wrong with a URL is told by quoting it: what stands at a wrong place may be the password.
        if not is_text(url):
            raise InvalidInputError("fleet: the URL must be a text, without NUL and lone surrogates")
        scheme, found, rest = url.partition("://")
        if not found or scheme not in _SCHEMES:
            raise InvalidInputError("fleet: give a URL such as postgresql+psycopg://user@host/database")
        rest, schema = _take_schema(rest)
        self.schema = schema or _SCHEMA
        """Where its tables are; the URL may name another one by `schema=`."""
        if not _NAME.fullmatch(self.schema):
            raise InvalidInputError(f"fleet: schema {quote(self.schema)}: use small letters, digits and _")
        try:
            parameters = conninfo_to_dict(f"postgresql://{rest}")
        except (psycopg.Error, ValueError):
            parameters = None  # what libpq says of it may quote the password
        if parameters is None or not _is_plain(rest, str(parameters.get("port") or "")):
            raise InvalidInputError(
                "fleet: the URL cannot be parsed; give postgresql+psycopg://user:password@host:port/database, with"
                " special characters as %xx (@ as %40, / as %2F), and after ? parameters that libpq knows, or schema"
            )
        self._secrets = [str(parameters[key]) for key in ("password", "sslpassword") if parameters.get(key)]
        self._parameters: dict[str, Any] = {
            "connect_timeout": CONNECT_SECONDS,
            "application_name": "limpet",
            "tcp_user_timeout": 1000 * STATEMENT_SECONDS,
            **parameters,
            "client_encoding": "UTF8",
        }
        shown = " ".join(f"{key}={parameters[key]}" for key in _SHOWN if parameters.get(key))
        self._text = f"fleet ({shown or 'default server'})"

    def __repr__(self) -> str:
        return self._text

    def open(self) -> Connection:
        """Return a new connection, with a transaction at the first statement. Raises psycopg.Error."""
        connection = Connection.connect(**self._parameters, autocommit=True)
        try:
            connection.begin(self.schema)
            connection.autocommit = False
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def is_default(self) -> bool:
        """True if the URL names no schema of its own."""
        return self.schema == _SCHEMA

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Connect, with what goes wrong in the block translated. Raises FleetError."""
        with self.errors_told(), self.open() as connection:
            connection.autocommit = True
            encoding = connection.info.parameter_status("server_encoding")
            if encoding is not None and encoding not in _ENCODINGS:
                raise FleetError(f"{self._text}: its encoding is {encoding}, which has not all characters: use UTF8")
            yield connection

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        """Raise FleetError for what psycopg raises in the block."""
        try:
            yield
        except psycopg.Error as error:
            # The cause is left out: a traceback would print it, and with it what it quotes.
            raise self.tell(error) from None

    def tell(self, error: BaseException) -> FleetError:
        """Return a FleetError that says what `error` does, without the password.

        Of what the server says its details are left out: they may quote a row, and with it what a config keeps secret.
        """
        said = error.diag.message_primary if isinstance(error, psycopg.Error) else None
        text = " ".join((said or str(error)).split()) or type(error).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        hint = _HINTS.get(error.sqlstate or "", "") if isinstance(error, psycopg.Error) else ""
        return FleetError(f"{self._text}: {text}{hint}")


def _is_plain(rest: str, ports: str) -> bool:
    """Say whether no password is taken for something else: it has @ or / in it, or the URL has no host."""
    place, _, path = rest.partition("?")[0].partition("/")
    return place.count("@") <= 1 and "@" not in path and all(not port or port.isdecimal() for port in ports.split(","))


def _take_schema(rest: str) -> tuple[str, str]:
    """Return the rest of a URL without its `schema=`, which is none of libpq's, and what that says."""
    place, mark, query = rest.partition("?")
    wanted, others = "", []
    for each in query.split("&"):
        if each.startswith("schema="):
            wanted = each.removeprefix("schema=")
        else:
            others.append(each)
    return f"{place}{mark if others != [''] and others else ''}{'&'.join(others)}", wanted


@contextmanager
def replicated(connection: Connection) -> Iterator[None]:
    """Run the block in a transaction that is durable when this ends: see `replication_required`."""
    with replication_required(connection), connection.transaction():
        yield


@contextmanager
def replication_required(connection: Connection) -> Iterator[None]:
    """Run the block; what it commits is durable when this ends, also on a standby that commits wait for.

    Cancelled while it waits for the standby, a commit succeeds with a warning; here it raises FleetError.
    """
    warnings: list[str] = []

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        if diagnostic.sqlstate == _NOT_REPLICATED and diagnostic.severity_nonlocalized == "WARNING":
            warnings.append(diagnostic.message_primary or "")

    connection.add_notice_handler(note)
    try:
        yield
    finally:
        connection.remove_notice_handler(note)
    if warnings:
        raise FleetError(f"fleet: {warnings[0]}; it is sent again")
