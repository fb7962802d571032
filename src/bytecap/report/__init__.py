"""What people look at: tables on the terminal."""

SHOWS_ONLY = "package"
