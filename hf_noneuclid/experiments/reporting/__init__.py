"""Curves, tables and figures of a sweep."""
