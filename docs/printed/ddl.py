"""Print schema/ddl.py from the tables: `python docs/printed/ddl.py > schema/ddl.py`."""

import sys

from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from limpet.schema.tables import TABLES

HEAD = '''"""The newest schema as SQL, printed from `tables` by docs/printed/ddl.py."""

CREATE = (
'''


def print_ddl() -> str:
    """Return the text of schema/ddl.py."""
    dialect = sqlite.dialect()
    made = [each for table in TABLES.sorted_tables for each in (CreateTable(table), *map(CreateIndex, table.indexes))]
    statements = [str(each.compile(dialect=dialect)).strip() for each in made]
    statements.append("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    lines = ("\n".join(line.rstrip() for line in each.replace("\t", "    ").splitlines()) for each in statements)
    return HEAD + "".join(f'    """{each}""",\n' for each in lines) + ")\n"


if __name__ == "__main__":
    sys.stdout.write(print_ddl())
