"""The pipeline: fit, score, summarise and export, from a model on disk or in memory to a file and back."""
