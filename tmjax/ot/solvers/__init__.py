"""ot/solvers"""
