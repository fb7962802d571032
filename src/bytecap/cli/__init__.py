"""Parse command lines, one file a command."""

SHOWS_ONLY = "package"
