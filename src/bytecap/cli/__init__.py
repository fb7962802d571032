"""The command line, one file a command."""

SHOWS_ONLY = "package"
