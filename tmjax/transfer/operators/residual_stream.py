"""Embeddings, output rows and norms: parameters other than projections that read or write the residual stream.

Through the stream's plan Q (`alignment.structure: full`), with A = diag(1/a) Q, B = diag(1/b) Q^T and scales s, s' of
the stream in both models: embeddings of shared tokens E^ = E_S diag(1/s') A^T diag(s); norm weights that write a site
g^ = diag(s) A diag(1/s') g_S with the site's scales; output rows H^ = H_S diag(g_S) B diag(1/g^) behind a final norm
g^ = A g_S, or the target's own. Tied output rows are E^, so the final norm makes up for their scale and for duplicated
units: g^_i = sum_j B_ji g_j s'_j / s_i.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from pydantic import Field

from tmjax.align.alignment import Alignment
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.spec import DecoderSpec, ParamSpec
from tmjax.recipes.base import Section
from tmjax.text.tokenizer import load_tokenizer, shared_tokens
from tmjax.transfer.contribution import Coefficients, Context, Contribution, Shape
from tmjax.transfer.source_view import SourceView
from tmjax.transfer.update_table import Table
from tmjax.typing import Array, ArrayLike, Params, pytree_dataclass


class ResidualStreamOptions(Section):
    """Options of the operator `residual_stream`."""

    embeddings: Annotated[
        Literal["keep", "shared"],
        Field(description="`shared` transports embeddings and output rows of tokens that both models have."),
    ] = "shared"
    norms: Annotated[
        Literal["keep", "transported"], Field(description="`transported` transports norms of the residual stream.")
    ] = "transported"
    norm_match: Annotated[
        bool, Field(description="Whether tables are rescaled to the norm of the target's rows that they may change.")
    ] = True


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
    """Contribution of the source to one parameter: its value, and a mask broadcastable to it."""

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

    def __init__(self, alignment: Alignment) -> None:
        if "resid" not in alignment.plans:
            raise InputError("embeddings and norms need the residual stream's plan: set alignment.structure: full")
        self.alignment, self.order = alignment, alignment.source_order.get("resid")
        self.weights = np.asarray(next(iter(alignment.layer_plans.values())).weights)
        kept = np.nonzero(self.weights.sum(axis=1) > 0)[0]
        self.ends = tuple((layer, int(self.weights[layer].argmax())) for layer in (kept[0], kept[-1]))

    def maps(self, layer: int, source_layer: int) -> _Maps:
        plan, rows, columns = self.alignment.plans["resid"].pair(layer, source_layer)
        q = np.asarray(plan.matrix(), np.float64)
        rows, columns = (size if w is None else np.asarray(w) for w, size in zip((rows, columns), q.shape, strict=True))
        ahead, back = q * np.reshape(rows, (-1, 1)), q.T * np.reshape(columns, (-1, 1))
        if self.order is not None:
            order = np.argsort(self.order[layer, source_layer])
            ahead, back = ahead[:, order], back[order]
        return _Maps(ahead, back)

    def scales(self, site: str, layer: int, source_layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns s [n] and 1 / s' [k] of a site."""
        pair = (self.alignment.target, layer), (self.alignment.source, source_layer)
        s, other = (np.asarray(side[site].scale(self.alignment.centred)[at], np.float64) for side, at in pair)
        if self.order is not None:
            other = other[np.argsort(self.order[layer, source_layer])]
        return s, np.where(other > 0, 1.0 / np.where(other > 0, other, 1.0), 0.0)


def transport_stream(
    alignment: Alignment, target: Model, source: Model, options: ResidualStreamOptions
) -> dict[str, dict[str, Moved]]:
    """Transports embeddings, output rows and norms; norms of queries and keys stay.

    Args:
        alignment: Alignment of the two models, with a plan of the site `resid`.
        target: The target.
        source: The source.
        options: Which of them are transported.

    Returns:
        Transported values and their masks by role (`embed`, `norm`) and path.

    Raises:
        InputError: The alignment has no plan of the residual stream, or there is nothing to transport.
    """
    if options.embeddings == "keep" and options.norms == "keep":
        return {}
    params = source.params
    stream = _StreamPlan(alignment)
    moved: dict[str, dict[str, Moved]] = {}
    if options.norms == "transported":
        moved["norm"] = _norms(stream, target, source, params)
    # Normed embeddings are no linear function of their table: a target that has them keeps it.
    if options.embeddings == "shared" and not target.spec.embedding_norm:
        moved["embed"] = _tables(stream, target, source, params, norms=options.norms == "transported")
    if not moved or not all(moved.values()):
        raise InputError("the two models have no norms or no tokens in common that could be transported")
    if options.norm_match:
        tables = moved.get("embed", {})
        tables |= {path: _matched(item, target.params[path]) for path, item in tables.items()}
    return moved


def _matched(item: Moved, old: ArrayLike) -> Moved:
    sizes = [jnp.linalg.norm(item.mask * jnp.asarray(x, jnp.float32)) for x in (old, item.value)]
    return replace(item, value=item.value * jnp.where(sizes[1] > 0, sizes[0] / jnp.maximum(sizes[1], 1e-30), 0.0))


def _array(params: Params, path: str) -> np.ndarray:
    return np.asarray(params[path], np.float64)


def _norms(stream: _StreamPlan, target: Model, source: Model, params: Params) -> dict[str, Moved]:
    items = {}
    offset, other = float(target.spec.norm_offset), float(source.spec.norm_offset)
    for path, old in target.params.items():
        base, kind = path.rpartition(".")[::2]
        if path not in params:
            continue
        shift = (offset, other) if kind == "weight" else (0.0, 0.0)
        if base == "norm" and target.spec.embedding_norm:
            continue  # it belongs to the output rows, which such a target keeps
        if base == "norm":
            items[path] = _moved(_final(stream, target, source, _array(params, path) + shift[1]) - shift[0])
        elif _NORM_SITES.get(base) in stream.alignment.target:  # a mixture's alignment has no sites of its MLP
            weight, value = _array(params, path) + shift[1], np.zeros(np.shape(old))
            for layer, m in np.argwhere(stream.weights > 0):
                s, inverse = stream.scales(_NORM_SITES[base], layer, m)
                value[layer] += stream.weights[layer, m] * s * (stream.maps(layer, m).ahead @ (inverse * weight[m]))
            kept = (stream.weights.sum(axis=1) > 0)[:, None]
            items[path] = _moved(value - shift[0], kept)
    return items


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
    pairs = [(t, s) for t, s in zip(own, other, strict=True) if t < target.spec.vocab and s < source.spec.vocab]
    own, other = (np.array([pair[i] for pair in pairs], int) for i in (0, 1))
    if not len(own):
        return {}
    maps, (s, inverse) = stream.maps(*stream.ends[0]), stream.scales("resid", *stream.ends[0])
    into = (maps.ahead * s[:, None] * inverse[None, :]).T * source.spec.embedding_scale / target.spec.embedding_scale
    shape = np.shape(target.params["embed.weight"])
    items = {"embed.weight": _rows(shape, own, _embeddings(params, source)[other] @ into)}
    if target.spec.learned_positions and source.spec.learned_positions:
        positions = (
            _array(params, "positions.weight") @ into * target.spec.embedding_scale / source.spec.embedding_scale
        )
        first, begin = target.spec.position_offset, source.spec.position_offset
        count = min(target.spec.max_positions, source.spec.max_positions)
        shape = np.shape(target.params["positions.weight"])
        items["positions.weight"] = _rows(shape, first + np.arange(count), positions[begin : begin + count])
    if not target.spec.tied_embeddings:
        rows = _array(params, "embed.weight" if source.spec.tied_embeddings else "head.weight")[other]
        last, scale = stream.maps(*stream.ends[1]), source.spec.logit_scale / target.spec.logit_scale
        # Source units that share a target unit may have different weights of the norm: these are folded into the rows.
        behind = _final_weight(params, source)
        ahead = last.ahead @ behind if norms else _final_weight(target.params, target)
        back = scale * behind[:, None] * last.back / np.where(np.abs(ahead) > 1e-6, ahead, np.inf)[None, :]
        items["head.weight"] = _rows(np.shape(target.params["head.weight"]), own, rows @ back)
    if target.spec.head_bias and source.spec.head_bias:
        bias = _array(params, "head.bias")[other] * source.spec.logit_scale / target.spec.logit_scale
        items["head.bias"] = _rows(np.shape(target.params["head.bias"]), own, bias)
    return items


def _embeddings(params: Params, model: Model) -> np.ndarray:
    """The embeddings [vocab, embed] as the first block reads them, but for their factor."""
    table = _array(params, "embed.weight")
    if not model.spec.embedding_norm:
        return table
    if model.spec.norm == "layer":
        table = table - table.mean(axis=1, keepdims=True)
    table = table / np.sqrt(np.square(table).mean(axis=1, keepdims=True) + model.spec.norm_eps)
    table = table * (_array(params, "embed_norm.weight") + float(model.spec.norm_offset))
    return table + _array(params, "embed_norm.bias") if model.spec.norm_bias else table


def _final_weight(params: Params, model: Model) -> np.ndarray:
    return _array(params, "norm.weight") + float(model.spec.norm_offset)


def _rows(shape: tuple[int, ...], chosen: np.ndarray, values: np.ndarray) -> Moved:
    value, mask = np.zeros(shape), np.zeros((shape[0], *[1] * (len(shape) - 1)))
    value[chosen], mask[chosen] = values, 1.0
    return _moved(value, mask)


def _moved(value: np.ndarray, mask: np.ndarray | float = 1.0) -> Moved:
    return Moved(jnp.asarray(value, jnp.float32), np.asarray(mask, np.float32))


@dataclass(frozen=True)
class FuseStream:
    """Rule by which parameters of the residual stream enter: W + mask (alpha W^ + beta W); see `contribution.Rule`."""

    spec: DecoderSpec
    param_specs: tuple[ParamSpec, ...]

    def __call__(self, params: Params, items: Stream, coefficients: Coefficients) -> dict[str, ArrayLike]:
        """Returns the parameters with the items fused in (float32), the rest as they are."""
        fused = dict(params)
        for role, moved in items.items():
            alpha, beta = (jnp.float32(value) for value in coefficients[role])
            for path, item in moved.items():
                old = jnp.asarray(params[path], jnp.float32)
                fused[path] = old + item.mask * (alpha * item.value + beta * old)
        return fused

    def scaled(self, items: Stream, factor: float) -> dict[str, dict[str, Moved]]:
        """Returns the items with the source's contribution multiplied by a factor."""
        return {
            role: {path: replace(item, value=item.value * factor) for path, item in moved.items()}
            for role, moved in items.items()
        }

    def rows(self, target: Params, fused: Params, items: Stream, coefficients: Coefficients) -> Table:
        """Returns the rows of the update table, under Hugging Face names."""
        specs, table = {row.path: row for row in self.param_specs}, {}
        for role, moved in items.items():
            alpha, beta = (float(value) for value in coefficients[role])
            for path, item in moved.items():
                old, new = (np.asarray(x[path], np.float64) for x in (target, fused))
                names, lead = specs[path].names(self.spec), (len(old) if specs[path].stacked else 1)
                mask, value = (np.broadcast_to(np.asarray(x, np.float64), old.shape) for x in (item.mask, item.value))
                split = [x.reshape(lead, -1) for x in (old, new, mask, value)]
                for name, w, after, kept, share in zip(names, *split, strict=True):
                    size = max(float(np.linalg.norm(w * kept)), 1e-30)
                    whole = max(float(np.linalg.norm(w)), 1e-30)
                    transported = float(np.linalg.norm(share * kept))
                    table[name] = {
                        "transported_to_target_norm": transported / size,
                        "raw_transported_to_target_norm": transported / size,
                        "effective_update": float(np.linalg.norm(after - w)) / whole,
                        "cosine": float((w * kept * share).sum()) / (size * max(transported, 1e-30)),
                        "source_part": abs(alpha) * transported / whole,
                        "dropped_mean": 0.0,
                        "alpha": alpha,
                        "beta": beta,
                    }
        return table


class ResidualStream:
    """Embeddings, output rows and norms through the plan of the residual stream."""

    name: ClassVar[str] = "residual_stream"
    options: ClassVar[type[Section]] = ResidualStreamOptions
    needs: ClassVar[frozenset[str]] = frozenset({"alignment"})
    chooses: ClassVar[bool] = False

    def roles(self, options: ResidualStreamOptions) -> tuple[str, ...]:
        """Returns the roles that it contributes to.

        Args:
            options: The operator's options.
        """
        moved = {"embed": options.embeddings == "shared", "norm": options.norms == "transported"}
        return tuple(role for role, is_moved in moved.items() if is_moved)

    def contribute(
        self, params: Params, source: SourceView, options: ResidualStreamOptions, context: Context
    ) -> Contribution:
        """Transports parameters that read or write the residual stream; see `Contributor.contribute`."""
        target = context.target
        items = transport_stream(source.alignment(), replace(target, params=params), source.model, options)
        return Contribution(items, FuseStream(target.spec, target.rows))

    def memory(self, target: Shape, source: Shape, options: ResidualStreamOptions, batch_tokens: int) -> int:
        """Estimates the bytes of transported tables, made in float64."""
        tables = 1 if target.spec.tied_embeddings else 2
        return (options.embeddings == "shared") * 8 * tables * target.spec.vocab * target.spec.hidden


OPERATOR = ResidualStream()
