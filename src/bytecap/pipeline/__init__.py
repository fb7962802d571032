"""Run whole jobs: fit, score, generate and export, from a model on disk or in memory to a file and back."""
