"""`python -m limpet` is `limpet`."""

from limpet.engine.cli import main

main()
