"""Bytes to arrays and back: container, ledger, coders, overlays. numpy only, never torch. Law: `docs/format.md`."""
