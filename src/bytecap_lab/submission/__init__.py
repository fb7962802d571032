"""Make Parameter Golf submissions: code inside the cap, whole submissions, and a recount (docs/golf.md)."""
