"""The config.json that a start was made with, as its directory has it."""

import json
from typing import Any

from limpet.engine.starters.oci.run_directory import RunDirectory
from limpet.recovery.files import find_small_file
from limpet.schema.layout import CONFIG_BYTES, CONFIG_FILE

PLAIN_CONFIG = "config.plain"
"""Where it is while the runtime is given another, with secrets, in its place."""


def read_config(run: RunDirectory) -> dict[str, Any]:
    """Return the config.json of a start, an empty one if it is gone or damaged. Raises OSError."""
    name = PLAIN_CONFIG if run.has(PLAIN_CONFIG) else CONFIG_FILE
    try:
        found = json.loads(find_small_file(run.join(name), CONFIG_BYTES) or b"")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}
