"""Optimal transport: costs, problems, results with certificates, one registry of solvers."""

from tmjax.ot.cost import correlation, standardise
from tmjax.ot.plan import DensePlan, EntropicPlan, LinearMap, LowRankPlan, MatchPlan, Plan, SignedPlan
from tmjax.ot.problem import Problem, uniform
from tmjax.ot.result import OTResult
from tmjax.ot.solve import solve
from tmjax.ot.solvers import SOLVERS, Capabilities, Solver, capabilities_of, make_solver, solver_options

__all__ = [
    "SOLVERS",
    "Capabilities",
    "DensePlan",
    "EntropicPlan",
    "LinearMap",
    "LowRankPlan",
    "MatchPlan",
    "OTResult",
    "Plan",
    "Problem",
    "SignedPlan",
    "Solver",
    "capabilities_of",
    "correlation",
    "make_solver",
    "solve",
    "solver_options",
    "standardise",
    "uniform",
]
