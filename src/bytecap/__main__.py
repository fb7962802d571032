"""`python -m bytecap`."""

from bytecap.cli.app import main

main()
