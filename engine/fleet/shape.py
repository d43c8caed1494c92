"""Whether the fleet's tables are as they were made: somebody may have altered them by hand."""

from collections.abc import Iterator, Mapping

from limpet.engine.database.sqlite.extract import ROWS
from limpet.engine.fleet.address import Address, Connection
from limpet.engine.fleet.rows import column_types
from limpet.schema.errors import FleetError
from limpet.schema.rows import EventRow
from limpet.schema.telling import get_log

_SENT = {"fleet_epoch": "bigint", "fleet_as_of": "bigint"}
_COLUMNS: Mapping[str, Mapping[str, str]] = {
    **{table: {"node": "text", **column_types(row_class), **_SENT} for table, (row_class, _) in ROWS.items()},
    "event": {"node": "text", **column_types(EventRow)},
    "node": {"name": "text", "epoch": "bigint", "opened_at": "bigint", "pruned": "bigint"},
    "fleet_node": {
        **dict.fromkeys(("name", "directory", "host", "path", "doubts"), "text"),
        **dict.fromkeys(("epoch", "pid", "as_of", "revision"), "bigint"),
        **dict.fromkeys(("claimed_at", "heard_at"), "timestamp with time zone"),
        "lease_seconds": "double precision",
        "is_whole": "boolean",
    },
}
"""By table, the columns that are read and written, and their types. Who looks may have added others."""
_KEYS: Mapping[str, tuple[str, ...]] = {
    **{table: ("node", *keys) for table, (_, keys) in ROWS.items()},
    "event": ("node", "revision"),
    "node": ("name",),
    "fleet_node": ("name",),
}
"""By table, the columns that no two rows have alike: without a unique index nothing can be written."""

_SELECT_COLUMNS = """
SELECT relname, attname, format_type(atttypid, NULL) FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s) AND attnum > 0 AND NOT attisdropped
    AND relkind IN ('r', 'p')"""
_SELECT_KEYS = """
SELECT relname, array_agg(attname::text) FROM pg_index
JOIN pg_class ON pg_class.oid = indrelid JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY(indkey)
WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s)
    AND indisunique AND indisvalid AND indimmediate AND indpred IS NULL AND indexprs IS NULL
GROUP BY relname, indexrelid"""
_SELECT_UNLOGGED = """
SELECT relname FROM pg_class WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s)
    AND relpersistence <> 'p' AND relname = ANY(%s) ORDER BY relname"""
_SELECT_DIVERTED = """
SELECT relname, 'trigger ' || tgname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %(schema)s) AND relname = ANY(%(tables)s)
    AND NOT tgisinternal AND tgenabled <> 'D' AND tgtype & 3 = 3 AND tgtype & 20 <> 0
UNION ALL SELECT relname, 'rule ' || rulename FROM pg_rewrite JOIN pg_class ON pg_class.oid = ev_class
WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %(schema)s) AND relname = ANY(%(tables)s)
    AND ev_enabled <> 'D' AND ev_type <> '1' ORDER BY 1, 2"""
"""What comes before a row is written, of INSERT and UPDATE; or before any statement."""

_BY_LABELS = "gin (labels_of(labels) jsonb_path_ops)"
_INDEXES: Mapping[tuple[str, str], str] = {
    ("event", "btree (node, id, revision)"): "the events of one container",
    ("container", "btree (id)"): "a container by its id",
    ("container", "btree (name)"): "a container by its name",
    ("container", _BY_LABELS): "containers by labels",
}
"""By table and definition, what is slow to look for without an index. Nothing is wrong then, and nothing is refused."""
_SELECT_INDEXES = r"""
SELECT relname, regexp_replace(pg_get_indexdef(indexrelid), '^.* USING | WITH \([^()]*\)$', '', 'g') FROM pg_index
JOIN pg_class ON pg_class.oid = indrelid
WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s) AND indisvalid"""
_LABELS_OF = r"""
BEGIN
    RETURN replace(labels, '\u0000', '\u0001')::jsonb;
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
    RETURN NULL;
END """
"""The body of the function by which labels are looked for."""
_MAKE_LABELS_OF = f"""CREATE OR REPLACE FUNCTION labels_of(labels text) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$ {_LABELS_OF} $$;
    DROP INDEX IF EXISTS container_by_labels; CREATE INDEX container_by_labels ON container USING {_BY_LABELS}"""
_SELECT_FUNCTION = """
SELECT prosrc FROM pg_proc WHERE pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s)
    AND proname = 'labels_of' AND pg_get_function_identity_arguments(pg_proc.oid) = 'labels text'"""
_log = get_log("limpet.fleet")


def require_shape(address: Address, connection: Connection) -> None:
    """Raise FleetError if the tables lack what limpet needs of them; log what is only slow as they are."""
    found = list(_find_missing(address, connection))
    if found:
        raise FleetError(
            f"{address}: the tables in schema {address.schema} were altered: {'; '.join(found)}. Undo that; or drop the"
            " schema: then each node that has an engine sends all of its records again"
        )
    has_function = has_labels_of(address, connection)
    if not has_function:
        _log.warning(
            "%s: to look for containers by labels is slow, the function labels_of was dropped or altered:"
            " SET search_path = %s; %s",
            *(address, address.schema, _plain(_MAKE_LABELS_OF)),
        )
    indexes = set(connection.execute(_SELECT_INDEXES, (address.schema,)).fetchall())
    for (table, definition), slow in _INDEXES.items():
        if (table, definition) not in indexes and (has_function or definition != _BY_LABELS):
            _log.warning(
                "%s: to look for %s is slow, its index was dropped: SET search_path = %s; CREATE INDEX ON %s USING %s",
                *(address, slow, address.schema, table, definition),
            )


def has_labels_of(address: Address, connection: Connection) -> bool:
    """Say whether the function by which labels are looked for is as it was made: another one may find too little."""
    rows = connection.execute(_SELECT_FUNCTION, (address.schema,)).fetchall()
    return [_plain(body) for (body,) in rows] == [_plain(_LABELS_OF)]


def _plain(text: str) -> str:
    """Return a statement in one line, without comments."""
    return " ".join(" ".join(line.partition("--")[0] for line in text.splitlines()).split())


def _find_missing(address: Address, connection: Connection) -> Iterator[str]:
    types: dict[str, dict[str, str]] = {}
    for table, name, kind in connection.execute(_SELECT_COLUMNS, (address.schema,)).fetchall():
        types.setdefault(table, {})[name] = kind
    unique = {(table, frozenset(names)) for table, names in connection.execute(_SELECT_KEYS, (address.schema,))}
    for (table,) in connection.execute(_SELECT_UNLOGGED, (address.schema, [*_COLUMNS])):
        yield f"{table} is UNLOGGED: a crash of the server empties it, and no standby has it"
    tables = {"schema": address.schema, "tables": [*_COLUMNS]}
    for table, what in connection.execute(_SELECT_DIVERTED, tables):
        yield f"{table} has {what}, which may keep rows out that are told to be there"
    for table, columns in _COLUMNS.items():
        there = types.get(table)
        if there is None:
            yield f"there is no table {table}"
            continue
        for name, kind in columns.items():
            if name not in there:
                yield f"{table} has no column {name}"
            elif there[name] != kind:
                yield f"{table}.{name} is {there[name]}, not {kind}"
        if (table, frozenset(_KEYS[table])) not in unique:
            yield f"{table} has no unique index of {', '.join(_KEYS[table])}"
