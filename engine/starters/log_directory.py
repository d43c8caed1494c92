"""Opens the directory of a container's log when the container is started.

The log's path was checked when the container was created; since then, whoever may write in the log directory can have
put a link into it.
"""

from limpet.engine.state.beneath import open_parent_beneath
from limpet.schema.errors import StartError, quote_path


def open_log_directory(log_directory: str, log_path: str) -> tuple[int, str]:
    """Return a descriptor (O_PATH) of the directory of `log_path`, and the log's name in it. Makes missing directories.

    `log_directory` is the sandbox's, and `log_path` what `choose_log_path` returned for it. Raises StartError.
    """
    try:
        return open_parent_beneath(log_directory, log_path, make=True)
    except OSError as error:
        raise StartError(
            f"log {quote_path(log_path)}: {error.strerror} ({quote_path(error.filename or log_directory)});"
            " a log's directories must be directories, not links"
        ) from error
