"""Attention matched as attention: key-value groups first, query heads inside them, rotary planes inside heads.

Logits of matched heads keep their size: q^ . k^ at the target's attention scale is q . k at the source's. Heads whose
scores fall with distance (ALiBi) are matched by their slopes too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from tmjax.align.statistics import Statistics
from tmjax.align.structure.planes import PlaneMatch, plane_map, planes_of, stretch
from tmjax.models.alibi import slopes
from tmjax.models.spec import DecoderSpec
from tmjax.ot import HeadMap, cover_edges
from tmjax.typing import Params

#: The sites that are matched together.
ATTENTION_SITES = ("q", "k", "v", "attn_mix")


@dataclass(frozen=True)
class AttentionSide:
    """One model's attention, by site: scales and root mean squares [S, heads, d] of the inputs of the logits.

    `factors` [S, heads, d] turn the units of q and k, which lie before the norms of queries and keys, into the
    normed ones: the norm's weight over the root mean square of the head (of all heads, where these are normed as one).
    """

    spec: DecoderSpec
    scales: Mapping[str, np.ndarray]
    sizes: Mapping[str, np.ndarray]
    factors: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls, spec: DecoderSpec, params: Params, statistics: Mapping[str, Statistics], *, centred: bool
    ) -> "AttentionSide":
        """From the statistics of q, k and v, and the norms of queries and keys among the parameters."""
        scales, sizes, factors = {}, {}, {}
        for site, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
            shape = (spec.layers, heads, spec.head_dim)
            rms = np.asarray(statistics[site].rms, np.float64).reshape(shape)
            factor = np.ones(shape)
            if spec.qk_norm != "none" and site != "v":
                weight = np.asarray(params[f"blocks.{site}_norm.weight"], np.float64) + float(spec.norm_offset)
                weight = weight.reshape(spec.layers, -1, spec.head_dim)
                axes = (1, 2) if spec.qk_norm == "full" else 2
                whole = np.sqrt(np.mean(np.square(rms), axis=axes, keepdims=True))
                factor = weight / np.maximum(whole, 1e-30) * factor
            factors[site] = factor
            scales[site] = np.asarray(statistics[site].scale(centred), np.float64).reshape(shape)
            sizes[site] = rms * np.abs(factor)
        return cls(spec, scales, sizes, factors)

    def logit_scale(self, layer: int) -> float:
        """Returns the factor on q . k in a layer."""
        scale = self.spec.head_dim**-0.5 if self.spec.attention_scale is None else self.spec.attention_scale
        return scale / (layer + 1) if self.spec.inverse_layer_scale else scale


class Edges(NamedTuple):
    """Matched heads, target and source, of each pair."""

    target: np.ndarray
    source: np.ndarray

    def counts(self, heads: int, source_heads: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts the pairs of each head."""
        return np.bincount(self.target, minlength=heads), np.bincount(self.source, minlength=source_heads)


@dataclass(frozen=True)
class HeadMatch:
    """The match of a pair of layers: pairs of groups, pairs of query heads and the pair of groups each lies in.

    `q_blocks` [Eh, d, d'] and `k_blocks` [Eg, d, d'] map queries and keys, averages over a target head's pairs; `costs`
    by site are 1 - similarity, averaged over pairs (v's comes with its plan).
    """

    groups: Edges
    heads: Edges
    group_of: np.ndarray
    q_blocks: np.ndarray
    k_blocks: np.ndarray
    costs: Mapping[str, float]


def _likeness(rho_gdgd: np.ndarray) -> np.ndarray:
    """Computes similarities of value heads [G, G'] from correlations [G, d, G', d']: the mean of units' best."""
    ahead, back = rho_gdgd.max(axis=3).mean(axis=1), rho_gdgd.max(axis=1).mean(axis=2)
    return np.clip((ahead + back) / 2, 0.0, 1.0)


def match_heads(
    target: AttentionSide, source: AttentionSide, layer: int, source_layer: int, rho: Mapping[str, np.ndarray]
) -> HeadMatch:
    """Matches the heads of a pair of layers from the correlations [n, k] of their q, k and v, and fits the maps."""
    spec, other = target.spec, source.spec
    ends = (spec, layer), (other, source_layer)
    match = PlaneMatch.of(*(planes_of(s.rotaries[s.layer_rotaries[i]], s.head_dim) for s, i in ends))
    size, cov = {}, {}
    for site in ("q", "k"):
        both = [side.scales[site][i] * side.factors[site][i] for side, i in ((target, layer), (source, source_layer))]
        size[site] = [np.abs(x) for x in both]
        cov[site] = _heads(rho[site], *both) * np.multiply.outer(*both)
    like_q, like_k = (match.similarity(cov[site], *size[site]) for site in ("q", "k"))
    like_v = _likeness(_heads(rho["v"], target.scales["v"][layer], source.scales["v"][source_layer]))
    each, each_source = spec.heads // spec.kv_heads, other.heads // other.kv_heads
    blocks = (
        (like_q - octaves(spec, other)).reshape(spec.kv_heads, each, other.kv_heads, each_source).transpose(0, 2, 1, 3)
    )
    inner = np.array([[_best(block) for block in row] for row in blocks])
    groups = Edges(*cover_edges(3.0 - inner - like_k - like_v))
    pairs, number = [], []
    for edge, (g, h) in enumerate(zip(*groups, strict=True)):
        inside = cover_edges(1.0 - blocks[g, h])
        pairs += zip(inside[0] + g * each, inside[1] + h * each_source, strict=True)
        number += [edge] * len(inside[0])
    heads, group_of = Edges(*np.array(pairs).T), np.array(number)
    q_blocks, k_blocks = _maps(target, source, (layer, source_layer), match, cov, groups, heads, group_of)
    costs = {"q": 1 - like_q[tuple(heads)].mean(), "k": 1 - like_k[tuple(groups)].mean()}
    return HeadMatch(groups, heads, group_of, q_blocks, k_blocks, costs)


def octaves(spec: DecoderSpec, other: DecoderSpec) -> np.ndarray:
    """Distances [heads, heads'] of the slopes of two models' heads, in octaves; 0 unless both have such biases (ALiBi).

    A head that is transported keeps the slope of the target's head, so an octave weighs as much as a whole likeness.
    """
    if spec.alibi is None or other.alibi is None:
        return np.zeros((spec.heads, other.heads))
    ours, theirs = (np.log2(slopes(each.heads) * each.alibi.scale) for each in (spec, other))
    return np.abs(ours[:, None] - theirs[None, :])


def _heads(rho_nk: np.ndarray, like: np.ndarray, source_like: np.ndarray) -> np.ndarray:
    """Correlations with heads apart, [H, d, G, d']."""
    return np.asarray(rho_nk, np.float64).reshape(*like.shape, *source_like.shape)


def _best(similarity: np.ndarray) -> float:
    """The mean similarity of heads matched one to one."""
    return float(similarity[linear_sum_assignment(-similarity)].mean())


def _maps(
    target: AttentionSide,
    source: AttentionSide,
    layers: tuple[int, int],
    match: PlaneMatch,
    cov: Mapping[str, np.ndarray],
    groups: Edges,
    heads: Edges,
    group_of: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of queries and keys: one map C per pair of groups, shared by all of its heads (see `planes`)."""
    shape = target.spec.head_dim, source.spec.head_dim
    ratio = source.logit_scale(layers[1]) / target.logit_scale(layers[0])
    size = {site: (target.sizes[site][layers[0]], source.sizes[site][layers[1]]) for site in ("q", "k")}
    factor = {site: (target.factors[site][layers[0]], source.factors[site][layers[1]]) for site in ("q", "k")}
    counts_h = heads.counts(target.spec.heads, source.spec.heads)
    counts_g = groups.counts(target.spec.kv_heads, source.spec.kv_heads)
    products = {site: match.products(cov[site]) for site in ("q", "k")}
    still = {site: match.still_products(cov[site]) for site in ("q", "k")}
    q_blocks, k_blocks = np.zeros((len(group_of), *shape)), np.zeros((len(groups.target), *shape))

    def norm(site: str, pairs: Edges) -> float:
        t, s = np.square(size[site][0][pairs.target]).sum(), np.square(size[site][1][pairs.source]).sum()
        return max(float(np.sqrt(t * s)), 1e-30)

    def sizes(dims: np.ndarray, at: int, inside: Edges, group: Edges) -> tuple[np.ndarray, np.ndarray]:
        """Root sums of squares of queries and keys over heads and over the last axis of `dims`."""
        roots = []
        for site, pairs in (("q", inside), ("k", group)):
            chosen = size[site][at][pairs[at]][:, dims]
            roots.append(np.sqrt(np.square(chosen).sum(axis=(0, -1))))
        return roots[0], roots[1]

    for edge, (g, h) in enumerate(zip(*groups, strict=True)):
        chosen = np.nonzero(group_of == edge)[0]
        inside, group = Edges(heads.target[chosen], heads.source[chosen]), Edges(np.array([g]), np.array([h]))
        total = products["q"][:, inside.target, inside.source].sum(axis=1) / norm("q", inside)
        total = total + products["k"][:, g, h] / norm("k", group)
        rho = stretch(sizes(match.target, 0, inside, group), sizes(match.source, 1, inside, group))
        joint = still["q"][inside.target, inside.source].sum(axis=0) / norm("q", inside)
        joint = joint + still["k"][g, h] / norm("k", group)
        rows, columns = linear_sum_assignment(-np.abs(joint))
        dims, source_dims = match.target_still[rows], match.source_still[columns]
        still_rho = stretch(
            sizes(dims[:, None], 0, inside, group), sizes(source_dims[:, None], 1, inside, group)
        ) * np.where(joint[rows, columns] < 0, -1.0, 1.0)
        angles, at = np.angle(total), (dims, source_dims)
        # A sign is its own inverse, so that both powers keep it.
        q_map, k_map = (plane_map(match, shape, angles, rho**p, (*at, still_rho**p)) for p in (1, -1))
        kept = np.concatenate([match.source.reshape(-1), source_dims])
        gamma = np.array([ratio * _lost(size["q"][1][one], size["k"][1][h], kept) for one in inside.source])
        shared = np.sqrt(gamma.mean())
        for number, one in enumerate(chosen):
            t, s = inside.target[number], inside.source[number]
            moved = q_map * factor["q"][1][s] / _safe(factor["q"][0][t])[:, None]
            q_blocks[one] = moved * gamma[number] / shared / counts_h[0][t]
        k_blocks[edge] = k_map * factor["k"][1][h] / _safe(factor["k"][0][g])[:, None] * shared / counts_g[0][g]
    return q_blocks, k_blocks


def _safe(x: np.ndarray) -> np.ndarray:
    """A norm's weight that is next to 0 hides its unit, so the value written for that unit has no effect."""
    return np.where(np.abs(x) > 1e-6, x, np.inf)


def _lost(q_size: np.ndarray, k_size: np.ndarray, kept: np.ndarray) -> float:
    """Factor that compensates the dimensions of a source head without a partner: size of all logits over the kept."""
    energy = np.square(q_size * k_size)
    return float(np.sqrt(energy.sum() / energy[kept].sum())) if energy[kept].sum() > 0 else 1.0


def value_maps(
    target: AttentionSide, source: AttentionSide, layers: tuple[int, int], match: HeadMatch, plans_edd: np.ndarray
) -> dict[str, HeadMap]:
    """The maps of all four sites, `plans_edd` being the couplings of value units inside every pair of groups.

    The input of o is a mixture of values: its map is that of the values, which keeps their sum over heads.
    """
    scale, source_scale = target.scales["v"][layers[0]], source.scales["v"][layers[1]]
    plans = np.asarray(plans_edd, np.float64)
    mass = np.abs(plans)
    rows, columns = (np.where(x > 0, x, np.inf) for x in (mass.sum(axis=2), mass.sum(axis=1)))
    s, t = scale[match.groups.target], source_scale[match.groups.source]
    ahead = s[:, :, None] * plans / rows[:, :, None] * _inverse(t)[:, None, :]
    back = t[:, :, None] * plans.transpose(0, 2, 1) / columns[:, :, None] * _inverse(s)[:, None, :]
    both = (target.spec.kv_heads, source.spec.kv_heads), (target.spec.heads, source.spec.heads)
    groups, heads, group_of = match.groups, match.heads, match.group_of
    inverse_q, inverse_k = (np.linalg.pinv(blocks) for blocks in (match.q_blocks, match.k_blocks))
    return {
        "q": _head_map(heads, both[1], match.q_blocks, inverse_q),
        "k": _head_map(groups, both[0], match.k_blocks, inverse_k),
        "v": _head_map(groups, both[0], *_averages(groups, both[0], ahead, back)),
        "attn_mix": _head_map(heads, both[1], *_averages(heads, both[1], ahead[group_of], back[group_of])),
    }


def _inverse(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, 1.0 / np.where(x > 0, x, 1.0), 0.0)


def _averages(
    edges: Edges, sizes: tuple[int, int], ahead: np.ndarray, back: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks divided by the number of pairs that their head is in."""
    given, received = edges.counts(*sizes)
    return ahead / given[edges.target][:, None, None], back / received[edges.source][:, None, None]


def _head_map(edges: Edges, sizes: tuple[int, int], to_target: np.ndarray, to_source: np.ndarray) -> HeadMap:
    arrays = (np.asarray(x, np.float32) for x in (to_target, to_source, *edges.counts(*sizes)))
    return HeadMap(*(x.astype(np.int32) for x in edges), *arrays)
