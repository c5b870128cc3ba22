"""Optimal transport: costs, problems, results with certificates, one registry of solvers."""

from tmjax.ot.cost import correlation, standardise
from tmjax.ot.plan import DensePlan, EntropicPlan, LowRankPlan, Plan
from tmjax.ot.problem import Problem, uniform
from tmjax.ot.result import OTResult
from tmjax.ot.solve import solve
from tmjax.ot.solvers import SOLVERS, Solver, make_solver

__all__ = [
    "SOLVERS",
    "DensePlan",
    "EntropicPlan",
    "LowRankPlan",
    "OTResult",
    "Plan",
    "Problem",
    "Solver",
    "correlation",
    "make_solver",
    "solve",
    "standardise",
    "uniform",
]
