"""Show results to people: tables on the terminal, self-contained pages with charts, values for JSON."""

SHOWS_ONLY = "package"
