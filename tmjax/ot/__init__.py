"""Optimal transport: costs, problems, results with certificates, one registry of solvers."""

from tmjax.ot.cost import Cost, FeatureCost, correlation, cost_matrix, standardise
from tmjax.ot.headmap import HeadMap
from tmjax.ot.plan import DensePlan, EntropicPlan, LinearMap, LowRankPlan, MatchPlan, Plan, SignedPlan
from tmjax.ot.problem import Problem, uniform
from tmjax.ot.result import OTResult
from tmjax.ot.solve import solve
from tmjax.ot.solvers import (
    SOLVERS,
    EachSolver,
    FeatureSolver,
    HostSolver,
    MemoryBoundSolver,
    PlainSolver,
    ResultProperties,
    ShapeCheckingSolver,
    Solver,
    WarmStartSolver,
    make_solver,
    solver_class,
    solver_options,
)
from tmjax.ot.solvers.base import check_shape, prepared, solve_each
from tmjax.ot.solvers.cover import cover_edges
from tmjax.ot.sparse import EdgePlan, SparsePlan

__all__ = [
    "SOLVERS",
    "Cost",
    "DensePlan",
    "EachSolver",
    "EdgePlan",
    "EntropicPlan",
    "FeatureCost",
    "FeatureSolver",
    "HeadMap",
    "HostSolver",
    "LinearMap",
    "LowRankPlan",
    "MatchPlan",
    "MemoryBoundSolver",
    "OTResult",
    "PlainSolver",
    "Plan",
    "Problem",
    "ResultProperties",
    "ShapeCheckingSolver",
    "SignedPlan",
    "Solver",
    "SparsePlan",
    "WarmStartSolver",
    "check_shape",
    "correlation",
    "cost_matrix",
    "cover_edges",
    "make_solver",
    "prepared",
    "solve",
    "solve_each",
    "solver_class",
    "solver_options",
    "standardise",
    "uniform",
]
