"""ott-jax, imported in one place without the noise that it makes on import."""

import warnings

with warnings.catch_warnings():
    # ott-jax imports jaxopt, which announces its retirement on import.
    warnings.filterwarnings("ignore", message="JAXopt is no longer maintained", category=DeprecationWarning)
    from ott.geometry.epsilon_scheduler import Epsilon
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.problems.quadratic.quadratic_problem import QuadraticProblem
    from ott.solvers.linear.acceleration import AndersonAcceleration, Momentum
    from ott.solvers.linear.sinkhorn import Sinkhorn, SinkhornOutput
    from ott.solvers.linear.sinkhorn_lr import LRSinkhorn
    from ott.solvers.quadratic.gromov_wasserstein import GromovWasserstein
    from ott.solvers.quadratic.gromov_wasserstein_lr import LRGromovWasserstein

__all__ = [
    "AndersonAcceleration",
    "Epsilon",
    "Geometry",
    "GromovWasserstein",
    "LRGromovWasserstein",
    "LRSinkhorn",
    "LinearProblem",
    "Momentum",
    "QuadraticProblem",
    "Sinkhorn",
    "SinkhornOutput",
]
