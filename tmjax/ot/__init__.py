"""Optimal transport: costs, problems, results with certificates, one registry of solvers."""

from tmjax.ot.cost import Cost, FeatureCost, correlation, cost_matrix, standardise
from tmjax.ot.headmap import HeadMap
from tmjax.ot.plan import DensePlan, EntropicPlan, LinearMap, LowRankPlan, MatchPlan, Plan, SignedPlan
from tmjax.ot.problem import Problem, uniform
from tmjax.ot.result import OTResult
from tmjax.ot.solve import solve
from tmjax.ot.solvers import SOLVERS, Capabilities, Solver, capabilities_of, make_solver, solver_options
from tmjax.ot.solvers.base import prepared, solve_each
from tmjax.ot.solvers.cover import cover_edges
from tmjax.ot.sparse import EdgePlan, SparsePlan

__all__ = [
    "SOLVERS",
    "Capabilities",
    "Cost",
    "DensePlan",
    "EdgePlan",
    "EntropicPlan",
    "FeatureCost",
    "HeadMap",
    "LinearMap",
    "LowRankPlan",
    "MatchPlan",
    "OTResult",
    "Plan",
    "Problem",
    "SignedPlan",
    "Solver",
    "SparsePlan",
    "capabilities_of",
    "correlation",
    "cost_matrix",
    "cover_edges",
    "make_solver",
    "prepared",
    "solve",
    "solve_each",
    "solver_options",
    "standardise",
    "uniform",
]
