"""Which limpet this is."""

import sys


def read_version() -> str:
    """Return the version of the code that runs.

    What is installed may be another by now, as while pip upgrades it, and in a frozen program nothing is.
    """
    package = sys.modules[__name__.partition(".")[0]]
    version: str = package.__version__
    return version
