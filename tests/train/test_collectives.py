"""Communication of the training step on eight devices: the compiled program moves the head once, outside the loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QWEN2, SPEC, loop_collectives

from tmjax.models.decoder import Readout, init_params
from tmjax.models.families import FAMILIES
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import Layout
from tmjax.train import loss
from tmjax.train.data import Batch
from tmjax.train.loss import TeacherTokens, summed_losses
from tmjax.train.modes import Plain, shardings_of
from tmjax.train.optimizer import TrainConfig, Weights
from tmjax.train.step import Objective, start, train_step

#: The head is far larger than all matrices of a layer together.
WIDE = {"vocab": 4096, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2}
SLOW = [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("fsdp=8", "data=2,fsdp=4", "tensor=8")]
HEAD = WIDE["vocab"] * WIDE["hidden"]


@pytest.fixture
def blocks(monkeypatch) -> None:
    """Blocks of few tokens: several for each device."""
    monkeypatch.setattr(loss, "LOGIT_ENTRIES", 1)
    monkeypatch.setattr(loss, "LEAST_TOKENS", 4)


def teacher_of(rng: np.random.Generator, rows: int, tokens: int, vocab: int) -> TeacherTokens:
    ids = np.stack([rng.choice(vocab, 3, replace=False) for _ in range(rows * tokens)]).reshape(rows, tokens, 3)
    mask = (rng.random((rows, tokens)) < 0.5).astype(np.float32)
    return TeacherTokens(ids.astype(np.int32), rng.dirichlet(np.ones(4), (rows, tokens))[..., :3].astype("f4"), mask)


def batch_of(spec: DecoderSpec, rows: int = 8, tokens: int = 12) -> Batch:
    rng = np.random.default_rng(0)
    ids, targets = (rng.integers(0, spec.vocab, (rows, tokens)).astype(np.int32) for _ in range(2))
    mask = (rng.random((rows, tokens)) < 0.8).astype(np.float32)
    return Batch(ids, targets, mask, None, teacher_of(rng, rows, tokens, spec.vocab))


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", *SLOW])
def test_losses_and_slopes_over_a_mesh_are_those_of_one_device(mesh, blocks) -> None:
    layout = Layout(mesh)
    spec = dataclasses.replace(SPEC, vocab=64)
    batch, rng = batch_of(spec), np.random.default_rng(1)
    table, bias, hidden = (rng.normal(0, 1, shape).astype(np.float32) for shape in ((64, 24), (64,), (8, 12, 24)))
    head = Readout(table, bias)

    @functools.partial(jax.jit, static_argnames="devices")
    def compute(head, hidden, labels, weight, teacher, devices):
        def total(head, hidden):
            losses = summed_losses(spec, head, hidden, labels, weight, teacher, devices)
            return losses[0], losses[1:]

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(head, hidden)

    rest = (batch.targets_bt, batch.mask_bt, batch.teacher)
    one = compute(head, hidden, *rest, None)
    places = Readout(*(layout.param_sharding("head", ("vocab", "embed")[: x.ndim], x.shape) for x in head))
    placed = jax.device_put(head, places)
    eight = compute(placed, *jax.tree.map(layout.place_batch, (hidden, *rest)), layout.mesh)
    for found, expected in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
    assert loss._pieces(8 // layout.batch_multiple, 12, 64) > 1


@pytest.mark.parametrize(
    ("mesh", "tied"),
    [
        ("fsdp=8", False),
        pytest.param("data=2,fsdp=4", True, marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=2,tensor=2", False, marks=pytest.mark.slow),
    ],
)
def test_no_loop_moves_the_head(mesh, tied, blocks) -> None:
    layout = Layout(mesh)
    spec = dataclasses.replace(QWEN2 if tied else SPEC, **WIDE)
    places = shardings_of(layout, FAMILIES["qwen2" if tied else "llama"].params(spec), spec)
    params = {path: jax.device_put(x, places[path]) for path, x in init_params(spec, jax.random.key(0)).items()}
    config = TrainConfig(steps=8, warmup=2, teacher_weight=1.0)
    objective = Objective(spec, config, Plain(), layout.mesh).compiled()
    batch = jax.tree.map(layout.place_batch, batch_of(spec))
    state = start(objective, params)
    program = train_step.lower(objective, state, {}, batch, jnp.float32(0.1), Weights.at(config, 0)).compile()
    moved = loop_collectives(program.as_text())
    assert moved, "layers are gathered in their loop; the parser sees nothing"
    assert max(size for _, size in moved) < HEAD / 8, sorted(moved, key=lambda item: -item[1])[:5]


def test_the_parser_sees_what_a_loop_moves() -> None:
    """The slope of a table that is split over devices, summed in every turn of a loop, as XLA does it by itself."""
    layout = Layout("fsdp=8")
    table = jax.device_put(np.ones((512, 32), np.float32), layout.param_sharding("x", ("vocab", "embed"), (512, 32)))
    states = layout.place_batch(np.ones((8, 4, 32), np.float32))

    def total(table, states):
        def turn(carry, part):
            return carry + jnp.einsum("be,ve->bv", part, table).sum(), None

        return jax.lax.scan(turn, jnp.float32(0), jnp.moveaxis(states, 1, 0))[0]

    text = jax.jit(jax.value_and_grad(total)).lower(table, states).compile().as_text()
    moved = loop_collectives(text)
    assert max(size for _, size in moved) >= 512 * 32 / 8
