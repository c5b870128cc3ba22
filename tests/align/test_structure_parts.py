"""The parts of a structured alignment, each against brute force or the forward pass's own rotary embedding."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SPEC

from tmjax.align.depth import monotone_matches
from tmjax.align.layer_plan import combine
from tmjax.align.statistics import Statistics
from tmjax.align.structure.heads import AttentionSide, match_heads, value_maps
from tmjax.align.structure.planes import PlaneMatch, Planes, plane_map, planes_of, stretch
from tmjax.errors import InputError
from tmjax.models.rotary import rotary_tables, rotate
from tmjax.models.spec import Alibi, DecoderSpec, Rotary
from tmjax.ot import HeadMap
from tmjax.text.tokenizer import load_tokenizer, shared_tokens

RNG = np.random.default_rng(0)


def _turned(x_d: np.ndarray, rotary: Rotary, position: int) -> np.ndarray:
    """A vector [d] as the forward pass turns it at a position."""
    tables = tuple(table[0] for table in rotary_tables((rotary,), len(x_d), jnp.asarray([position])))
    turned = rotate(jnp.asarray(x_d, jnp.float32)[None, None, None], tables, interleaved=rotary.interleaved)
    return np.asarray(turned, np.float64)[0, 0, 0]


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (Rotary(), Rotary()),
        (Rotary(interleaved=True), Rotary()),
        (Rotary(fraction=0.5), Rotary(fraction=0.5)),
        (Rotary(theta=5e5, scaling="llama3", factor=8.0), Rotary(theta=5e5, scaling="llama3", factor=8.0)),
        (Rotary(scaling="none"), Rotary(scaling="none")),
    ],
    ids=lambda rotary: f"{rotary.scaling}{rotary.fraction}{rotary.interleaved}",
)
def test_maps_of_planes_keep_every_logit(target, source):
    """q through C, k through C^-T at the target's positions: the source's logits, whatever angles and lengths."""
    d = 16
    match = PlaneMatch.of(planes_of(target, d), planes_of(source, d))
    assert 2 * len(match.target) + len(match.target_still) == d
    angles, rho = RNG.uniform(0, 6, len(match.target)), RNG.uniform(0.5, 2, len(match.target))
    still = match.target_still, RNG.permutation(match.source_still), RNG.uniform(0.5, 2, len(match.target_still))
    q, k = RNG.normal(size=(2, d))
    q_map, k_map = (plane_map(match, (d, d), angles, rho**p, (*still[:2], still[2] ** p)) for p in (1, -1))
    for position in (0, 3, 50):
        there = _turned(q, source, position) @ _turned(k, source, 7)
        here = _turned(q_map @ q, target, position) @ _turned(k_map @ k, target, 7)
        assert here == pytest.approx(there, abs=1e-4)


def test_planes_match_by_frequency_whatever_head_dim_theta_and_scaling():
    wide, narrow = planes_of(Rotary(), 32), planes_of(Rotary(), 16)
    match = PlaneMatch.of(narrow, wide)
    assert match.source[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14] and match.target[:, 0].tolist() == list(range(8))
    squared = PlaneMatch.of(narrow, planes_of(Rotary(theta=1e8), 32))
    assert squared.source[:, 0].tolist() == list(range(8))  # 1e8^(-2i/32) = 1e4^(-2i/16)
    halved = PlaneMatch.of(planes_of(Rotary(scaling="linear", factor=10.0), 16), wide)
    frequencies = planes_of(Rotary(), 16).frequencies / 10
    best = min(
        itertools.combinations(range(16), 8),
        key=lambda c: np.abs(np.log(frequencies / wide.frequencies[list(c)])).sum(),
    )
    distance = np.abs(np.log(frequencies / wide.frequencies[halved.source[:, 0]])).sum()
    assert distance == pytest.approx(np.abs(np.log(frequencies / wide.frequencies[list(best)])).sum())
    nothing = PlaneMatch.of(planes_of(Rotary(), 16), planes_of(Rotary(scaling="none"), 16))
    assert len(nothing.target) == 0 and len(nothing.source_still) == 16


def test_similarity_does_not_see_angles():
    planes = Planes(np.array([[0, 2], [1, 3]]), np.array([1.0, 0.1]), np.array([4]))
    match = PlaneMatch.of(planes, planes)
    x = RNG.normal(size=(500, 2, 5))
    angle = plane_map(match, (5, 5), np.array([1.0, 4.0]), np.ones(2), (np.array([4]), np.array([4]), -np.ones(1)))
    y = x[:, ::-1] @ angle.T
    cov = np.einsum("rhd,rge->hdge", x, y) / len(x)
    sizes = [np.sqrt(np.square(z).mean(axis=0)) for z in (x, y)]
    similarity = match.similarity(cov, *sizes)
    np.testing.assert_allclose([similarity[0, 1], similarity[1, 0]], 1, rtol=1e-6)
    assert similarity[0, 0] < 0.3
    np.testing.assert_allclose(
        np.exp(-1j * np.angle(match.products(cov)[:, 0, 1])), np.exp(1j * np.array([1.0, 4.0])), atol=1e-6
    )


def test_stretch_balances_queries_and_keys():
    target, source = (np.array([6.0, 0.0]), np.array([1.0, 1.0])), (np.array([2.0, 2.0]), np.array([3.0, 1.0]))
    np.testing.assert_allclose(stretch(target, source), [3.0, 1.0])  # q grows 3-fold, k shrinks to a third


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3), (1, 5)])
def test_monotone_is_the_cheapest_of_all_monotone_couplings(shape):
    cost = RNG.random(shape)
    small, large = sorted(shape)
    wide = cost if shape[0] <= shape[1] else cost.T
    best = min(wide[range(small), list(chosen)].sum() for chosen in itertools.combinations(range(large), small))
    plan = monotone_matches(cost)
    assert (plan * cost).sum() * small == pytest.approx(best)
    assert plan.sum() == pytest.approx(1) and np.count_nonzero(plan) == small
    rows, columns = np.nonzero(plan)
    assert (np.diff(rows) > 0).all() and (np.diff(columns) > 0).all()
    kept = combine(plan, plan, gaps=True)
    np.testing.assert_array_equal(kept.weights, plan * small)
    np.testing.assert_allclose(kept.dropped, 0, atol=1e-6)


def test_monotone_keeps_to_the_pairs_that_are_allowed():
    cost, allowed = np.zeros((2, 3)), np.array([[False, True, False], [True, True, True]])
    assert np.argwhere(monotone_matches(cost, allowed)).tolist() == [[0, 1], [1, 2]]
    with pytest.raises(InputError, match="no monotone coupling"):
        monotone_matches(cost, np.array([[False, False, True], [True, True, True]]))


def test_head_maps_are_their_dense_matrices():
    heads, source_heads = np.array([0, 1, 1, 2]), np.array([1, 0, 1, 1])
    to_target, to_source = RNG.normal(size=(4, 3, 5)), RNG.normal(size=(4, 5, 3))
    dense, back = np.zeros((9, 10)), np.zeros((10, 9))
    for e, (h, g) in enumerate(zip(heads, source_heads, strict=True)):
        dense[3 * h : 3 * h + 3, 5 * g : 5 * g + 5] += to_target[e]
        back[5 * g : 5 * g + 5, 3 * h : 3 * h + 3] += to_source[e]
    arrays = (heads, source_heads, to_target, to_source, np.bincount(heads), np.bincount(source_heads))
    plan = HeadMap(*(jnp.asarray(x, jnp.float32 if x.ndim > 1 else None) for x in arrays))
    x, y = RNG.normal(size=(9, 2)), RNG.normal(size=(10, 2))
    for found, wanted in (
        (plan.matrix(), dense),
        (plan.apply(jnp.asarray(y)), dense @ y),
        (plan.apply_transpose(jnp.asarray(x)), back @ x),
        (plan.reversed().apply(jnp.asarray(y)), back.T @ y),
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def _side(spec: DecoderSpec, x: dict[str, np.ndarray], params: dict) -> AttentionSide:
    def of(y: np.ndarray) -> Statistics:
        rms = np.sqrt(np.square(y).mean(axis=0))
        return Statistics(*(z[None] for z in (y.mean(axis=0), y.std(axis=0), rms, np.abs(y).mean(axis=0))))

    return AttentionSide.of(spec, params, {site: of(y) for site, y in x.items()}, centred=True)


@pytest.mark.parametrize("norms", [False, True])
def test_logits_of_unrelated_heads_keep_their_size(norms):
    """Not a copy but another model: q^ . k^ at the target's scale is q . k at the source's, head by matched head."""
    target = dataclasses.replace(SPEC, layers=1, attention_scale=0.7)
    source = dataclasses.replace(SPEC, layers=1, heads=4, kv_heads=2, head_dim=8, attention_scale=0.1)
    source = dataclasses.replace(source, qk_norm="head") if norms else source
    params = {f"blocks.{site}_norm.weight": RNG.uniform(0.5, 2, (1, 8)) for site in ("q", "k")}
    latent = RNG.normal(size=(400, 6))

    def rows(units: int) -> np.ndarray:
        return latent @ RNG.normal(size=(6, units)) + RNG.normal(size=(400, units))

    sides = [
        {site: rows(8 * heads) for site, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))}
        for spec in (target, source)
    ]
    rho = {site: np.corrcoef(sides[0][site], sides[1][site], rowvar=False) for site in ("q", "k", "v")}
    rho = {site: x[: sides[0][site].shape[1], sides[0][site].shape[1] :] for site, x in rho.items()}
    described = _side(target, sides[0], {}), _side(source, sides[1], params)
    found = match_heads(*described, 0, 0, rho)
    # 3 heads in each of 2 groups against 2 in each of 2: every head is matched, a source head twice.
    assert sorted(found.heads.target.tolist()) == list(range(6)) and set(found.heads.source.tolist()) == set(range(4))
    assert (found.heads.target // 3 == found.groups.target[found.group_of]).all()
    assert (found.heads.source // 2 == found.groups.source[found.group_of]).all()
    for e, (h, g) in enumerate(zip(*found.heads, strict=True)):
        q, k = sides[1]["q"][5, 8 * g : 8 * g + 8], sides[1]["k"][9, 8 * (g // 2) : 8 * (g // 2) + 8]
        whole = [described[1].factors[site][0, head] for site, head in (("q", g), ("k", g // 2))]
        moved = found.q_blocks[e] @ q, found.k_blocks[found.group_of[e]] @ k
        there = _turned(q * whole[0], source.rotary, 11) @ _turned(k * whole[1], source.rotary, 4) * 0.1
        here = _turned(moved[0], target.rotary, 11) @ _turned(moved[1], target.rotary, 4) * 0.7
        assert here == pytest.approx(there, rel=1e-3, abs=1e-4) and h < 6
    if norms:
        size = np.sqrt(np.square(sides[1]["q"]).reshape(400, 4, 8).mean(axis=(0, 2)))
        np.testing.assert_allclose(described[1].factors["q"][0], params["blocks.q_norm.weight"] / size[:, None])


def test_heads_that_are_not_alike_match_by_their_slopes():
    spec = dataclasses.replace(SPEC, layers=1, rotary=Rotary(scaling="none"), alibi=Alibi())
    target, source = (dataclasses.replace(spec, heads=n, kv_heads=n, head_dim=4) for n in (4, 8))
    held = [dict.fromkeys(("q", "k", "v"), RNG.normal(size=(50, 4 * side.heads))) for side in (target, source)]
    rho = dict.fromkeys(("q", "k", "v"), np.zeros((16, 32)))
    found = match_heads(_side(target, held[0], {}), _side(source, held[1], {}), 0, 0, rho)
    # Slopes of four heads are 2^-2, 2^-4, ..., of eight 2^-1, 2^-2, ...: each has one that is equal to it.
    pairs = set(zip(*found.heads, strict=True))
    assert {(h, 2 * h + 1) for h in range(4)} <= pairs and {g for _, g in pairs} == set(range(8))
    assert all(abs(2 * (h + 1) - (g + 1)) <= 1 for h, g in pairs)


def test_values_and_what_mixes_them_are_mapped_alike():
    """x through the input map of o and back through the values' map: averages over duplicates, nothing else."""
    target = dataclasses.replace(SPEC, layers=1, heads=2, kv_heads=2, head_dim=4)
    source = dataclasses.replace(SPEC, layers=1, heads=3, kv_heads=3, head_dim=4)
    x = RNG.normal(size=(300, 8))
    order = np.array([5, 4, 7, 6, 1, 0, 3, 2, 4, 5, 6, 7])  # groups 1, 0 and 1 again, values in another order
    y = x[:, order] * RNG.uniform(0.5, 2, 12)
    held = [dict.fromkeys(("q", "k", "v"), z) for z in (x, y)]
    rho = np.corrcoef(x, y, rowvar=False)[:8, 8:]
    sides = _side(target, held[0], {}), _side(source, held[1], {})
    v_only = dict.fromkeys(("q", "k"), np.zeros_like(rho)) | {"v": rho}
    found = match_heads(*sides, 0, 0, v_only)
    assert sorted(zip(*found.groups, strict=True)) == [(0, 1), (1, 0), (1, 2)]
    plans = rho.reshape(2, 4, 3, 4)[found.groups.target, :, found.groups.source] > 0.99
    maps = value_maps(*sides, (0, 0), found, plans.astype(float))
    np.testing.assert_allclose(np.asarray(maps["v"].matrix()) @ y.T, x.T, atol=1e-5)
    np.testing.assert_allclose(maps["attn_mix"].apply_transpose(jnp.asarray(x.T)), y.T, atol=1e-5)


def test_shared_tokens_stand_for_the_same_text(qwen2_dir, llama_dir):
    target, source = load_tokenizer(qwen2_dir), load_tokenizer(llama_dir)
    own, other = shared_tokens(target, source)
    assert len(own) > 500 and len(set(own)) == len(own) == len(set(other))
    plain = [(a, b) for a, b in zip(own, other, strict=True) if a not in target.special_ids]
    assert all(target.fast.decode([a]) == source.fast.decode([b]) for a, b in plain)
    pairs = dict(zip(own, other, strict=True))
    assert pairs[target.prefix] == source.prefix and pairs[target.suffix] == source.suffix
    missing = set(range(len(target.fast))) - set(own)
    theirs = set(source.fast.get_vocab())
    assert not [t for t in missing if target.fast.convert_ids_to_tokens(t) in theirs]
    assert shared_tokens(target, target) == (list(range(len(target.fast))),) * 2
