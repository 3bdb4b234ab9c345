"""Suites, and the runs of a sweep."""
