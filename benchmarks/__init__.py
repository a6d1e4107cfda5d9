"""Benchmarks: posteriors known in closed form, quality tables, timing suites."""
