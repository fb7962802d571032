"""Allocate bytes: measured points, their lower hulls, one slope, and a step for every tensor."""
