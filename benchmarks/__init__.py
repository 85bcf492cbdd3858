"""Benchmarks: they measure what the docs claim about speed."""
