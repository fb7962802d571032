"""Turn bytes into arrays and back: container, ledger, coders, overlays.

This room needs numpy only and never imports torch. `docs/format.md` is its law: where code and document differ, the
code is wrong.
"""
