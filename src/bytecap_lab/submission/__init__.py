"""Parameter Golf: code inside the cap, whole submissions, and a recount from outside (docs/golf.md)."""
