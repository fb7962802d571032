"""Baselines: methods as published or as people use them, under the same cap, container and evaluation."""
