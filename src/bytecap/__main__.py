"""`python -m bytecap`."""

from bytecap.cli import main

main()
