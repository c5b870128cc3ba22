"""Grids of settings and comparison of solvers."""
