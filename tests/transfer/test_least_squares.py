"""Sums and ridge systems on meshes and in the forms that accelerators take, against NumPy and one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import QWEN2
from tmjax.activations.joined import join
from tmjax.models.decoder import init_params
from tmjax.models.families import FAMILIES
from tmjax.sharding.mesh import Layout
from tmjax.transfer.least_squares import prediction_sums, ridge_systems
from tmjax.transfer.least_squares.ridge_systems import TOLERANCE, blocked, right_solve, split
from tmjax.transfer.prediction_solver import PredictionOptions, PredictionTargets, Solver

SPEC = QWEN2
ROWS = FAMILIES["qwen2"].params(SPEC)
RIDGE = 0.1


def system(layers: int, n: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grams of activations with outliers, right-hand sides, and the solutions in float64."""
    generator = np.random.default_rng(n)
    x = generator.normal(size=(layers, 2 * n, n)) * np.where(np.arange(n) < 3, 30.0, 1.0)
    gram, values = np.swapaxes(x, 1, 2) @ x / (2 * n), generator.normal(size=(2, layers, out, n))
    damped = gram + RIDGE * np.trace(gram, axis1=1, axis2=2)[:, None, None] / n * np.eye(n)
    return gram.astype(np.float32), values.astype(np.float32), values @ np.linalg.inv(damped)


@pytest.mark.parametrize("n, block", [(40, 8), (43, 8), (21, 64)])
def test_cholesky_in_blocks_solves_ridge_systems(n, block) -> None:
    """Whole blocks, a part of one at the end, and a single one."""
    gram, values, truth = system(3, n, 5)
    x, error = jax.jit(blocked, static_argnames=("ridge", "block"))(gram, values, RIDGE, block)
    np.testing.assert_allclose(x, truth, atol=1e-5 * np.abs(truth).max())
    assert error.shape == (3,) and 0 < float(error.max()) <= TOLERANCE


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(3, id="fewer than devices", marks=pytest.mark.slow),
        pytest.param(8, id="one each", marks=pytest.mark.slow),
        pytest.param(1, id="rows are split"),
    ],
)
def test_devices_share_layers_or_rows(layers) -> None:
    gram, values, truth = system(layers, 24, 5)
    mesh = Layout("data=2,fsdp=2,tensor=2").mesh
    x, error = jax.jit(split, static_argnames=("ridge", "mesh", "block"))(gram, values, RIDGE, mesh, 8)
    np.testing.assert_allclose(x, truth, atol=1e-5 * np.abs(truth).max())
    assert x.shape == values.shape and float(error[0]) <= TOLERANCE


def test_a_residual_that_stays_is_reported_and_zero_is_solved() -> None:
    gram, values, _ = system(2, 24, 5)
    x, error = blocked(jnp.asarray(gram), jnp.zeros_like(values), RIDGE, 8)
    assert not np.any(x) and not np.any(error)
    _, error = blocked(-jnp.asarray(gram), jnp.asarray(values), RIDGE, 8)
    assert not np.any(np.asarray(error) <= TOLERANCE), "no factor of a negative matrix"


def test_a_cpu_keeps_lapack() -> None:
    gram, values, truth = system(2, 24, 5)
    x, _ = right_solve(gram, jnp.asarray(values), RIDGE, None, True)
    np.testing.assert_allclose(x, truth, atol=1e-4 * np.abs(truth).max())
    x, _ = right_solve(gram[0], jnp.asarray(values[:, 0]), RIDGE, None, False)
    np.testing.assert_allclose(x, truth[:, 0], atol=1e-5 * np.abs(truth).max())


def targets(layout: Layout) -> list[PredictionTargets]:
    """Texts of the target and a teacher's probabilities at most of their tokens; the second batch has only these."""
    generator = np.random.default_rng(0)
    batches = []
    for own in (True, False):
        texts = [generator.integers(0, SPEC.vocab, length).tolist() for length in (50, 40, 60, 30, 20, 64)]
        for batch in join(SPEC, texts, 256, layout):
            token = np.argsort(generator.random((*batch.ids.shape, SPEC.vocab)))[..., :3].astype(np.int32)
            weight = generator.dirichlet(np.ones(4), batch.ids.shape)[..., :3] * (batch.text >= 0)[..., None]
            batches.append(PredictionTargets(batch, own, token, weight.astype(np.float32)))
    return batches


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return {path: 5 * value for path, value in init_params(SPEC, jax.random.key(1)).items()}


def solver(mesh: str | None = None, dtype: str = "float32") -> Solver:
    return Solver(SPEC, ROWS, {}, PredictionOptions(), dtype=jnp.dtype(dtype), layout=Layout(mesh))


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2"])
def test_a_mesh_sums_as_one_device_does_and_keeps_everything_split(mesh, params) -> None:
    """A vocabulary of 50, which eight devices do not divide."""
    one, many = solver(), solver(mesh)
    placed = {
        row.path: jax.device_put(params[row.path], many.layout.place(row, row.stacked_shape(SPEC)))
        for row in ROWS
        if row.tied_to is None
    }
    truth = one.sums(params, targets(many.layout))
    sums = many.sums(placed, targets(many.layout))
    assert not np.any(sums.cross[:, SPEC.vocab :])
    sums = sums._replace(cross=sums.cross[:, : SPEC.vocab], curvature=sums.curvature[: SPEC.vocab])
    for a, b in zip(jax.tree.leaves(sums), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    total = many.program.zeros()
    for array, axis in ((total.cross, 1), (total.curvature, 0)):
        assert array.sharding.shard_shape(array.shape)[axis] * many.layout.devices == array.shape[axis]
    for path, array in total.inner.items():
        assert array.sharding.spec[2:] == many.placements[path].spec[1:]
    for array in (total.gram, *total.grams.values()):
        assert not array.sharding.is_fully_replicated
    many = replace(many, start=placed)
    directions = many.directions(many.sums(placed, targets(many.layout)))
    moved = many.moved(placed, directions, 0.5, (0.1, 0.1))
    for path, change in directions.items():
        specs = change.sharding.spec[1:], moved[path].sharding.spec, many.placements[path].spec
        assert len({tuple(spec) for spec in specs}) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sums_of_products_are_float32(dtype) -> None:
    """Of many terms, whose running sum bfloat16 could not hold; against float64."""
    generator = np.random.default_rng(0)
    x, y = (jnp.asarray(generator.normal(size=(4, 500, n)) + 1, dtype) for n in (6, 5))
    total = prediction_sums._summed("bti,btj->ij", x, y)
    truth = np.einsum("bti,btj->ij", np.asarray(x, np.float64), np.asarray(y, np.float64))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, truth, rtol=2e-5)


def test_accelerators_solve_in_blocks_and_say_where_that_fails(params, monkeypatch) -> None:
    """The whole chain in the form of an accelerator, against the CPU's."""
    held = solver("fsdp=4")
    truth = held.directions(held.sums(params, targets(held.layout)))
    monkeypatch.setattr(ridge_systems, "BLOCK", 16)
    monkeypatch.setattr("tmjax.transfer.prediction_solver.jax.default_backend", lambda: "tpu")
    blocks = held.directions(held.sums(params, targets(held.layout)))
    for path, change in truth.items():
        np.testing.assert_allclose(blocks[path], change, atol=1e-3 * float(jnp.abs(change).max()))
