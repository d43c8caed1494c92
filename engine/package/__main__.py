"""The command `limpet`, and `python -m limpet`: loads the command line, and runs it.

Ctrl-C while it is loaded ends this process by the signal, and prints nothing. Before that is so, only what is built
into Python is loaded.
"""

from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal  # type: ignore[import-not-found]

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> "NoReturn":
    """Run the command line and exit."""
    is_pythons = getsignal(SIGINT) is default_int_handler  # it is not, where it was ignored when this began
    if is_pythons:
        signal(SIGINT, SIG_DFL)
    from limpet.engine.cli import main as run  # noqa: PLC0415  # it is what takes its time

    if is_pythons:
        signal(SIGINT, default_int_handler)
    run()


if __name__ == "__main__":
    main()
