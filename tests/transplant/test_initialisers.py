"""Rows of new tokens against their formulas in float64."""

import numpy as np
import pytest

from tmjax.transplant.initialisers.base import mean_rows
from tmjax.transplant.initialisers.pursuit import matching_pursuit
from tmjax.transplant.initialisers.similar import sparsemax


def test_means_of_pieces() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    expected = [table[2], (table[0] + table[3]) / 2, table.mean(axis=0)]
    np.testing.assert_allclose(mean_rows([[2], [0, 3], []], table), expected)
    np.testing.assert_allclose(mean_rows([[1, 2]], table[:, 0]), [4.5])


def plain_pursuit(goal: np.ndarray, atoms: np.ndarray, count: int) -> tuple[list[int], np.ndarray]:
    """Orthogonal matching pursuit as it is written down (Pati et al. 1993)."""
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen: list[int] = []
    residual = goal
    for _ in range(count):
        likeness = np.abs(unit @ residual)
        likeness[chosen] = -1
        chosen.append(int(likeness.argmax()))
        weights = np.linalg.lstsq(atoms[chosen].T, goal, rcond=None)[0]
        residual = goal - weights @ atoms[chosen]
    return chosen, weights


def test_matching_pursuit_is_the_textbook_one() -> None:
    generator = np.random.default_rng(0)
    atoms = generator.normal(size=(50, 24)) * generator.uniform(0.2, 5, size=(50, 1))
    goals = generator.normal(size=(300, 24))
    places, weights = matching_pursuit(goals, atoms, 6)
    for goal, place, weight in list(zip(goals, places, weights, strict=True))[::17]:
        chosen, expected = plain_pursuit(goal, atoms, 6)
        assert list(place) == chosen
        np.testing.assert_allclose(weight, expected, rtol=2e-4, atol=1e-5)


def test_pursuit_finds_what_is_sparse_and_ignores_copies() -> None:
    generator = np.random.default_rng(1)
    atoms = generator.normal(size=(40, 32))
    atoms[7] = atoms[3]  # the same direction twice adds nothing
    goal = 2 * atoms[3] - atoms[21]
    places, weights = matching_pursuit(goal[None], atoms, 8)
    np.testing.assert_allclose(weights[0] @ atoms[places[0]], goal, atol=1e-4)
    assert np.isfinite(weights).all() and np.abs(weights[0]).max() < 3


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    scores = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    weights = sparsemax(scores).astype(np.float64)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert (weights >= 0).all() and ((weights > 0).sum(axis=1) < 15).all()
    # Optimality: scores - weights is largest, and the same, where weights are positive.
    for slack, positive in zip(scores - weights, weights > 1e-6, strict=True):
        assert np.ptp(slack[positive]) < 1e-5 and slack[~positive].max() <= slack[positive].min() + 1e-5


@pytest.mark.parametrize("size", [1, 2])
def test_sparsemax_of_few(size) -> None:
    np.testing.assert_allclose(sparsemax(np.full((1, size), 3.0, np.float32)), np.full((1, size), 1 / size))
