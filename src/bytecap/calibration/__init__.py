"""Measure what errors cost: one pass over text, its statistics, and the metric that every coder minimises."""
