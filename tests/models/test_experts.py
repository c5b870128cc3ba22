"""The expert layer: products of chosen experts alone, gradients, caches and meshes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers import SPEC

from tests.models.test_generate import cached_logits
from tmjax.checkpoints.hf import open_model
from tmjax.checkpoints.load import load_model
from tmjax.commands.plan.counting import counted
from tmjax.errors import CheckpointError, InputError
from tmjax.models.decoder import ForwardPlan, bind, forward, init_params
from tmjax.models.experts import grouped
from tmjax.models.experts.expert_layer import Mixture, choose
from tmjax.models.experts.grouped import grouped_product, tile_rows
from tmjax.models.experts.mixture import Experts, runs_of
from tmjax.models.families import FAMILIES
from tmjax.sharding.mesh import Layout
from tools.make_checkpoint import make_checkpoint

EXPERTS = Experts(8, 2, 20, scale=1.5, choice_bias=True, shared_width=16, shared_gate=True)
EXPERTS = dataclasses.replace(EXPERTS, logit_bias=True, bias=True, limit=0.5, gain=1.7)
MIXED = dataclasses.replace(SPEC, experts=dataclasses.replace(EXPERTS, dense=(0,)))
#: Of a family, so that a checkpoint can be written: dense, sparse, sparse.
GLM = dataclasses.replace(
    SPEC,
    mlp=40,
    rotary=dataclasses.replace(SPEC.rotary, fraction=0.5),
    experts=Experts(8, 2, 16, router="sigmoid", choice_bias=True, shared_width=16, dense=(0,)),
)


def sharp_params(spec, seed=0):
    params = init_params(spec, jax.random.key(seed))
    matrices = {path for path, value in params.items() if value.ndim > 2 and not path.endswith("bias")}
    return {path: value * 8 if path in matrices else value + 0.1 for path, value in params.items()}


def dense_product(x, w, sizes):
    """Every row with its own matrix, in float64."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    result = np.zeros((len(x), w.shape[1]))
    result[: len(group)] = np.einsum("ri,roi->ro", np.asarray(x[: len(group)], np.float64), np.float64(w)[group])
    return result


SIZES = {
    "even": (16, 16, 16, 16),
    "one group": (64,),
    "empty groups": (0, 0, 50, 0, 3, 0),
    "rows of no group": (5, 0, 9),
    "fewer rows than groups": (0, 1, 0, 0, 1, 0, 0, 0, 0, 1),
    "many": tuple(range(40)),
    "none": (0, 0),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_meet_the_matrix_of_their_group(name, dtype) -> None:
    sizes = np.array(SIZES[name], np.int32)
    generator = np.random.default_rng(0)
    rows = int(sizes.sum()) + (7 if name in ("rows of no group", "none") else 0)
    x = jnp.asarray(generator.normal(size=(rows, 24)), dtype)
    w = jnp.asarray(generator.normal(size=(len(sizes), 10, 24)), dtype)
    out = jax.jit(grouped_product)(x, w, sizes)
    assert out.dtype == dtype and out.shape == (rows, 10)
    expected = dense_product(x.astype(jnp.float32), w.astype(jnp.float32), sizes)
    np.testing.assert_allclose(
        np.float64(out.astype(jnp.float32)), expected, atol=1e-4 if dtype == jnp.float32 else 0.2
    )
    assert not np.asarray(out[int(sizes.sum()) :].astype(jnp.float32)).any()


@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_those_of_a_ragged_dot(name) -> None:
    sizes = np.array(SIZES[name], np.int32)
    generator = np.random.default_rng(1)
    rows = int(sizes.sum()) + 3
    x, w = generator.normal(size=(rows, 24)), generator.normal(size=(len(sizes), 10, 24))
    x, w, c = (np.float32(a) for a in (x, w, generator.normal(size=(rows, 10))))

    def loss(product, x, w):
        return jnp.sum(jnp.sin(product(x, w, jnp.asarray(sizes))) * c)

    def ragged(x, w, sizes):
        return jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), sizes, precision="highest")

    with jax.numpy_dtype_promotion("strict"):
        ours = jax.jit(jax.value_and_grad(lambda *a: loss(grouped_product, *a), (0, 1)))(x, w)
    theirs = jax.value_and_grad(lambda *a: loss(ragged, *a), (0, 1))(x, w)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("contract", [1, 2])
def test_tpus_compute_the_same_products(name, contract) -> None:
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    generator = np.random.default_rng(2)
    rows = int(sizes.sum()) + 3
    w = jnp.asarray(generator.normal(size=(len(sizes), 10, 24)), jnp.float32)
    x, y = (jnp.asarray(generator.normal(size=(rows, size)), jnp.float32) for size in (w.shape[contract], 7))
    tiled, ragged = (jax.jit(f, static_argnames="contract") for f in (grouped.tiled_rows, grouped.ragged_rows))
    np.testing.assert_allclose(ragged(x, w, sizes, contract), tiled(x, w, sizes, contract), atol=1e-4)
    tiled, ragged = (jax.jit(f)(y, x, sizes) for f in (grouped.tiled_weights, grouped.ragged_weights))
    np.testing.assert_allclose(ragged, tiled, atol=1e-4)


def test_groups_limit_the_choice() -> None:
    experts = Experts(8, 2, 4, router="sigmoid", groups=4, chosen_groups=1)
    logits = jnp.log(jnp.array([[5.0, 0.1, 3.0, 3.1, 4.0, 0.2, 1.0, 1.0]]))  # the best expert is in no best group
    assert sorted(np.asarray(choose(experts, logits, None).ids[0])) == [2, 3]
    open_to_all = dataclasses.replace(experts, groups=1)
    assert sorted(np.asarray(choose(open_to_all, logits, None).ids[0])) == [0, 4]
    biased = choose(open_to_all, logits, jnp.zeros(8).at[5].set(9.0))
    assert 5 in np.asarray(biased.ids)  # chosen by its bias, but weighed by its score
    scores = np.asarray(jax.nn.sigmoid(logits))[0]
    weight = dict(zip(*(np.asarray(x)[0].tolist() for x in biased), strict=True))[5]
    assert weight == pytest.approx(scores[5] / (scores[0] + scores[5]), rel=1e-5)


def test_layers_of_one_kind_run_together() -> None:
    assert runs_of(4, None) == ((0, 4, False, 0),)
    assert runs_of(5, dataclasses.replace(EXPERTS, dense=(0, 3))) == (
        (0, 1, False, 0),
        (1, 3, True, 0),
        (3, 4, False, 1),
        (4, 5, True, 2),
    )


@pytest.mark.slow
def test_training_gradients_are_those_of_finite_differences() -> None:
    """Of the whole forward, computed again block by block: experts with biases and cuts, routers, dense layers."""
    params = sharp_params(MIXED)
    # Of these texts no token is so near another expert that a step changes its experts.
    ids = np.random.default_rng(3).integers(0, MIXED.vocab, (2, 24)).astype(np.int32)

    def loss(params, remat=False):
        hidden = bind(MIXED, params).run(ids, ForwardPlan(remat=remat)).hidden
        return jnp.mean(jnp.square(hidden) * jnp.arange(MIXED.hidden, dtype=jnp.float32))

    slopes = jax.jit(jax.grad(lambda params: loss(params, remat=True)))(params)
    evaluate = jax.jit(loss)
    # Experts change soon with the router, and float32 has few digits of what a small bias does.
    sizes = {"moe_blocks.router.weight": 1e-4, "moe_blocks.router.logit_bias": 1e-3}
    for path in (
        "moe_blocks.down.weight",
        "moe_blocks.down.bias",
        "moe_blocks.gate.bias",
        "moe_blocks.router.weight",
        "moe_blocks.router.logit_bias",
        "moe_blocks.shared_up.weight",
        "blocks.q.weight",
    ):
        # Along the slope itself, far fewer digits are lost than by entry.
        step = sizes.get(path, 3e-4) / float(jnp.linalg.norm(slopes[path]))
        ends = [evaluate(params | {path: params[path] + sign * step * slopes[path]}) for sign in (1, -1)]
        measured = float(ends[0] - ends[1]) / (2 * step)
        assert measured == pytest.approx(float(jnp.sum(jnp.square(slopes[path]))), rel=0.05), path
    assert not np.asarray(slopes["moe_blocks.router.bias"]).any()


def test_the_cache_gives_the_logits_of_the_whole_text() -> None:
    params = sharp_params(MIXED)
    generator = np.random.default_rng(2)
    asked = [generator.integers(1, MIXED.vocab, n).tolist() for n in (3, 9)]
    after = generator.integers(1, MIXED.vocab, (2, 6)).tolist()
    cached = cached_logits(MIXED, params, asked, after)
    for row, (prompt, rest) in enumerate(zip(asked, after, strict=True)):
        whole = forward(MIXED, params, np.array([prompt + rest], np.int32))[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(cached[row], whole, atol=2e-4 * float(np.std(whole)))


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("data=2,fsdp=2,tensor=2", "tensor=8")]
)
def test_eight_devices_compute_what_one_computes(mesh) -> None:
    """Logits and gradients; every device of the axis tensor has its part of the experts."""
    spec = dataclasses.replace(MIXED, hidden=32, heads=8, kv_heads=8, vocab=64)
    params, layout = sharp_params(spec), Layout(mesh)
    rows = {row.path: row for row in FAMILIES["glm4_moe"].params(GLM)}
    ids = np.random.default_rng(3).integers(0, spec.vocab, (8, 12)).astype(np.int32)

    def loss(params, ids, mesh=None):
        model = bind(spec, params)
        logits = model.logits(model.run(ids, ForwardPlan(mesh=mesh)).hidden)
        return jnp.mean(jnp.square(logits)), logits

    def place(path, value):
        row = rows.get(path)
        return value if row is None else jax.device_put(value, layout.place(row, value.shape))

    placed = {path: place(path, value) for path, value in params.items()}
    experts = placed["moe_blocks.up.weight"].sharding
    assert experts.shard_shape(params["moe_blocks.up.weight"].shape)[1] == 8 // layout.sizes["tensor"]
    compute = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="mesh")
    (_, one), slopes = compute(params, ids)
    (_, many), others = compute(placed, layout.place_batch(ids), mesh=layout.mesh)
    np.testing.assert_allclose(one, many, atol=1e-4 * float(np.std(one)))
    for path, slope in slopes.items():
        np.testing.assert_allclose(slope, others[path], atol=2e-4 * float(jnp.abs(slope).max() + 1e-6), err_msg=path)


def test_experts_are_loaded_straight_into_their_shards(tmp_path, monkeypatch) -> None:
    directory = make_checkpoint(tmp_path / "glm", "glm4_moe", GLM)
    layout = Layout("data=2,fsdp=2,tensor=2")
    opened = open_model(directory)
    path = "moe_blocks.down.weight"
    read = []
    lazy = opened.params[path]

    def recorded(slices):
        read.append(lazy.read(slices).shape)
        return lazy.read(slices)

    row = next(row for row in opened.rows if row.path == path)
    placed = dataclasses.replace(lazy, read=recorded).place(layout.place(row, lazy.shape))
    assert lazy.shape == (2, 8, 24, 16) and {*read} == {(2, 4, 12, 16)}
    stored = safetensors.numpy.load_file(directory / "model.safetensors")
    for layer in (1, 2):
        for expert in range(8):
            name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
            np.testing.assert_array_equal(placed[layer - 1, expert], stored[name])


def test_layers_that_predict_further_tokens_are_left_out(tmp_path) -> None:
    directory = make_checkpoint(tmp_path / "glm", "glm4_moe", GLM)
    plain = load_model(directory)
    stored = safetensors.numpy.load_file(directory / "model.safetensors")
    stored["model.layers.3.eh_proj.weight"] = np.ones((24, 48), np.float32)
    safetensors.numpy.save_file(stored, directory / "model.safetensors")
    model = load_model(directory)
    assert model.params.keys() == plain.params.keys()
    assert "1 tensors that predict tokens beyond the next one (model.layers.3.*) are not read" in model.notes[-1]
    stored["model.layers.4.eh_proj.weight"] = np.ones((24, 48), np.float32)
    safetensors.numpy.save_file(stored, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.4"):
        load_model(directory)


def test_a_mesh_that_does_not_divide_the_experts_is_refused(tmp_path) -> None:
    spec = dataclasses.replace(GLM, experts=dataclasses.replace(GLM.experts, count=9))
    directory = make_checkpoint(tmp_path / "glm", "glm4_moe", spec)
    with pytest.raises(InputError, match="tensor=2 does not divide experts=9"):
        load_model(directory, placement=Layout("tensor=2").place)


def test_only_the_chosen_experts_compute() -> None:
    """Products of the forward pass against those of the active parameters.

    `counted` takes the loops over tiles to compute every row once; the rows that tiles really have, padding included,
    follow from the choice of the router.
    """
    experts = Experts(32, 4, 64, shared_width=32)
    spec = dataclasses.replace(SPEC, hidden=64, mlp=128, experts=experts, layers=2)
    params = sharp_params(spec)
    ids = np.random.default_rng(0).integers(0, spec.vocab, (4, 256)).astype(np.int32)
    flops = counted(jax.make_jaxpr(lambda p, ids: forward(spec, p, ids))(params, ids), {}).total
    per_token = {
        path: math.prod(value.shape) for path, value in params.items() if value.ndim > 1 and "norm" not in path
    }
    for path in ("gate", "up", "down"):
        per_token[f"moe_blocks.{path}.weight"] *= experts.chosen / experts.count
    per_token.pop("embed.weight")
    attention = 4 * spec.layers * spec.heads * spec.head_dim * ids.shape[1]  # scores and their sums, per token
    active = ids.size * (2 * sum(per_token.values()) + attention)
    assert active * 0.999 <= flops <= active * 1.05

    model = Mixture(spec, rngs=nnx.Rngs(0))
    h = jax.random.normal(jax.random.key(1), (ids.size, spec.hidden))
    chosen = np.asarray(choose(experts, model.router.logits(h), None).ids)
    sizes, rows = np.bincount(chosen.ravel(), minlength=experts.count), chosen.size
    tile = tile_rows(rows, experts.count)
    computed = int((-(-sizes // tile) * tile).sum())
    inner = 2 * 3 * spec.layers * spec.hidden * experts.width
    assert (flops + inner * (computed - rows)) / active < 1.2
    dense = flops + inner * (ids.size * experts.count - rows)
    assert dense / active > 3  # as a product of all tokens with all experts would be
