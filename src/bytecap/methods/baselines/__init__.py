"""Run baselines, methods as published or in use, under the same cap, container and evaluation."""
