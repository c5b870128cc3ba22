"""Embeddings, output rows and norms: what reads or writes the residual stream beside the projections.

Through the stream's plan Q (`alignment.structure: full`), with A = diag(1/a) Q, B = diag(1/b) Q^T and scales s, s' of
the stream in both models: embeddings of shared tokens E^ = E_S diag(1/s') A^T diag(s); norm weights that write a site
g^ = diag(s) A diag(1/s') g_S with the site's scales; output rows H^ = H_S diag(g_S) B diag(1/g^) behind a final norm
g^ = A g_S, or the target's own. Tied output rows are E^, so the final norm makes up for their scale and for duplicated
units: g^_i = sum_j B_ji g_j s'_j / s_i.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from tmjax.align.alignment import Alignment
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.spec import ParamSpec
from tmjax.recipes.merge import FusionOptions
from tmjax.text.tokenizer import load_tokenizer, shared_tokens
from tmjax.transfer.apply import Coefficients
from tmjax.typing import Array, ArrayLike, Params, pytree_dataclass

#: Norms by path, and the site that they write; the two behind a branch write what is added to the stream.
_NORM_SITES = {
    "blocks.attn_norm": "attn_in",
    "blocks.mlp_norm": "mlp_in",
    "blocks.attn_post_norm": "resid",
    "blocks.mlp_post_norm": "resid",
}


@pytree_dataclass
@dataclass(frozen=True)
class Moved:
    """What the source contributes to one parameter: its value, and a mask broadcastable to it."""

    value: Array
    mask: ArrayLike


#: By pseudo-role (`embed`, `norm`), then by path.
Stream = Mapping[str, Mapping[str, Moved]]


@dataclass(frozen=True)
class _Maps:
    """A [n, k] and B [k, n] of a pair of layers, in float64, the source's units permuted for a control."""

    ahead: np.ndarray
    back: np.ndarray


class _StreamPlan:
    """The stream's plan and scales, and which pairs of layers stand for the stream's two ends."""

    def __init__(self, alignment: Alignment, permutation: np.ndarray | None) -> None:
        if "resid" not in alignment.plans:
            raise InputError("embeddings and norms need the residual stream's plan: set alignment.structure: full")
        self.alignment, self.permutation = alignment, permutation
        self.weights = np.asarray(next(iter(alignment.layer_plans.values())).weights)
        kept = np.nonzero(self.weights.sum(axis=1) > 0)[0]
        self.ends = tuple((layer, int(self.weights[layer].argmax())) for layer in (kept[0], kept[-1]))

    def maps(self, layer: int, source_layer: int) -> _Maps:
        plan, rows, columns = self.alignment.plans["resid"].pair(layer, source_layer)
        q = np.asarray(plan.matrix(), np.float64)
        rows, columns = (size if w is None else np.asarray(w) for w, size in zip((rows, columns), q.shape, strict=True))
        ahead, back = q * np.reshape(rows, (-1, 1)), q.T * np.reshape(columns, (-1, 1))
        if self.permutation is not None:
            order = np.argsort(self.permutation[layer, source_layer])
            ahead, back = ahead[:, order], back[order]
        return _Maps(ahead, back)

    def scales(self, site: str, layer: int, source_layer: int) -> tuple[np.ndarray, np.ndarray]:
        """s [n] and 1 / s' [k] of a site."""
        pair = (self.alignment.target, layer), (self.alignment.source, source_layer)
        s, other = (np.asarray(side[site].scale(self.alignment.centred)[at], np.float64) for side, at in pair)
        if self.permutation is not None:
            other = other[np.argsort(self.permutation[layer, source_layer])]
        return s, np.where(other > 0, 1.0 / np.where(other > 0, other, 1.0), 0.0)


def transport_stream(
    alignment: Alignment,
    target: Model,
    source: Model,
    options: FusionOptions,
    *,
    source_params: Params | None = None,
    permutations: Mapping[str, np.ndarray] | None = None,
) -> dict[str, dict[str, Moved]]:
    """Transports what the options ask for; norms of queries and keys stay. Raises InputError without a stream's plan.

    With `options.norm_match` tables are scaled to the norm of the target's rows that they may change.
    """
    if options.embeddings == "keep" and options.norms == "keep":
        return {}
    params = source.params if source_params is None else source_params
    stream = _StreamPlan(alignment, None if permutations is None else permutations["resid"])
    found: dict[str, dict[str, Moved]] = {}
    if options.norms == "transported":
        found["norm"] = _norms(stream, target, source, params)
    if options.embeddings == "shared":
        found["embed"] = _tables(stream, target, source, params, norms=options.norms == "transported")
    if not found.get("norm", {"": None}) or not found.get("embed", {"": None}):
        raise InputError("the two models have no norms or no tokens in common that could be transported")
    if options.norm_match:
        tables = found.get("embed", {})
        tables |= {path: _matched(item, target.params[path]) for path, item in tables.items()}
    return found


def _matched(item: Moved, old: ArrayLike) -> Moved:
    sizes = [jnp.linalg.norm(item.mask * jnp.asarray(x, jnp.float32)) for x in (old, item.value)]
    return replace(item, value=item.value * jnp.where(sizes[1] > 0, sizes[0] / jnp.maximum(sizes[1], 1e-30), 0.0))


def _array(params: Params, path: str) -> np.ndarray:
    return np.asarray(params[path], np.float64)


def _norms(stream: _StreamPlan, target: Model, source: Model, params: Params) -> dict[str, Moved]:
    found = {}
    offset, other = float(target.spec.norm_offset), float(source.spec.norm_offset)
    for path, old in target.params.items():
        base, kind = path.rpartition(".")[::2]
        if path not in params:
            continue
        shift = (offset, other) if kind == "weight" else (0.0, 0.0)
        if base == "norm":
            found[path] = _moved(_final(stream, target, source, _array(params, path) + shift[1]) - shift[0])
        elif base in _NORM_SITES:
            weight, value = _array(params, path) + shift[1], np.zeros(np.shape(old))
            for layer, m in np.argwhere(stream.weights > 0):
                s, inverse = stream.scales(_NORM_SITES[base], layer, m)
                value[layer] += stream.weights[layer, m] * s * (stream.maps(layer, m).ahead @ (inverse * weight[m]))
            kept = (stream.weights.sum(axis=1) > 0)[:, None]
            found[path] = _moved(value - shift[0], kept)
    return found


def _final(stream: _StreamPlan, target: Model, source: Model, value: np.ndarray) -> np.ndarray:
    """The final norm's weight (or bias)."""
    maps = stream.maps(*stream.ends[1])
    if not target.spec.tied_embeddings:
        return maps.ahead @ value
    s, inverse = stream.scales("resid", *stream.ends[0])
    scale = source.spec.logit_scale * target.spec.embedding_scale
    scale = scale / (target.spec.logit_scale * source.spec.embedding_scale)
    ratio = np.where(inverse > 0, 1.0 / np.where(inverse > 0, inverse, 1.0), 0.0)
    return scale * (maps.back.T @ (value * ratio)) * np.where(s > 0, 1.0 / np.where(s > 0, s, 1.0), 0.0)


def _tables(stream: _StreamPlan, target: Model, source: Model, params: Params, *, norms: bool) -> dict[str, Moved]:
    """Embeddings, learned positions and output rows."""
    own, other = shared_tokens(*(load_tokenizer(model.directory, model.spec.vocab) for model in (target, source)))
    held = [(t, s) for t, s in zip(own, other, strict=True) if t < target.spec.vocab and s < source.spec.vocab]
    own, other = (np.array([pair[i] for pair in held], int) for i in (0, 1))
    if not len(own):
        return {}
    maps, (s, inverse) = stream.maps(*stream.ends[0]), stream.scales("resid", *stream.ends[0])
    into = (maps.ahead * s[:, None] * inverse[None, :]).T * source.spec.embedding_scale / target.spec.embedding_scale
    shape = np.shape(target.params["embed.weight"])
    found = {"embed.weight": _rows(shape, own, _array(params, "embed.weight")[other] @ into)}
    if target.spec.learned_positions and source.spec.learned_positions:
        positions = (
            _array(params, "positions.weight") @ into * target.spec.embedding_scale / source.spec.embedding_scale
        )
        shape = np.shape(target.params["positions.weight"])
        most = min(shape[0], len(positions))
        found["positions.weight"] = _rows(shape, np.arange(most), positions[:most])
    if not target.spec.tied_embeddings:
        rows = _array(params, "embed.weight" if source.spec.tied_embeddings else "head.weight")[other]
        last, scale = stream.maps(*stream.ends[1]), source.spec.logit_scale / target.spec.logit_scale
        # Source units that share a target unit may lie behind different weights of the norm: these go into the rows.
        behind = _final_weight(params, source)
        ahead = last.ahead @ behind if norms else _final_weight(target.params, target)
        back = scale * behind[:, None] * last.back / np.where(np.abs(ahead) > 1e-6, ahead, np.inf)[None, :]
        found["head.weight"] = _rows(np.shape(target.params["head.weight"]), own, rows @ back)
    return found


def _final_weight(params: Params, model: Model) -> np.ndarray:
    return _array(params, "norm.weight") + float(model.spec.norm_offset)


def _rows(shape: tuple[int, int], chosen: np.ndarray, values: np.ndarray) -> Moved:
    value, mask = np.zeros(shape), np.zeros((shape[0], 1))
    value[chosen], mask[chosen] = values, 1.0
    return _moved(value, mask)


def _moved(value: np.ndarray, mask: np.ndarray | float = 1.0) -> Moved:
    return Moved(jnp.asarray(value, jnp.float32), np.asarray(mask, np.float32))


def fuse_stream(params: Params, stream: Stream, coefficients: Coefficients) -> dict[str, ArrayLike]:
    """W + mask (alpha W^ + beta W) of every parameter of the stream (float32), the rest as they are."""
    fused = dict(params)
    for role, items in stream.items():
        alpha, beta = (jnp.float32(value) for value in coefficients[role])
        for path, item in items.items():
            old = jnp.asarray(params[path], jnp.float32)
            fused[path] = old + item.mask * (alpha * item.value + beta * old)
    return fused


def stream_without_source(stream: Stream) -> dict[str, dict[str, Moved]]:
    """The same with the source's contribution set to zero."""
    return {
        role: {path: replace(item, value=item.value * 0) for path, item in items.items()}
        for role, items in stream.items()
    }


def stream_table(
    target: Model, fused: Params, stream: Stream, coefficients: Coefficients
) -> dict[str, dict[str, float]]:
    """Rows of `update_table` for the stream's parameters, under their Hugging Face names."""
    rows: dict[str, ParamSpec] = {row.path: row for row in target.rows}
    table = {}
    for role, items in stream.items():
        alpha, beta = (float(value) for value in coefficients[role])
        for path, item in items.items():
            old, new = (np.asarray(x[path], np.float64) for x in (target.params, fused))
            names, lead = rows[path].names(target.spec), (len(old) if rows[path].stacked else 1)
            mask, value = (np.broadcast_to(np.asarray(x, np.float64), old.shape) for x in (item.mask, item.value))
            split = [x.reshape(lead, -1) for x in (old, new, mask, value)]
            for name, w, after, kept, moved in zip(names, *split, strict=True):
                size = max(float(np.linalg.norm(w * kept)), 1e-30)
                whole = max(float(np.linalg.norm(w)), 1e-30)
                transported = float(np.linalg.norm(moved * kept))
                table[name] = {
                    "transported_to_target_norm": transported / size,
                    "raw_transported_to_target_norm": transported / size,
                    "effective_update": float(np.linalg.norm(after - w)) / whole,
                    "cosine": float((w * kept * moved).sum()) / (size * max(transported, 1e-30)),
                    "source_part": abs(alpha) * transported / whole,
                    "dropped_mean": 0.0,
                    "alpha": alpha,
                    "beta": beta,
                }
    return table
