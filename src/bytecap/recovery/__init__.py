"""Recovery: tuning what is stored, at equal bytes, by the divergence from the original."""
