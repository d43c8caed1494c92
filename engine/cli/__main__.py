"""`python -m limpet.engine.cli` is `limpet`."""

from limpet.engine.cli import main

main()
