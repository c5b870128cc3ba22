"""Rows of new tokens, one way per file."""
