"""Tune stored values at equal bytes by the divergence from the original."""
