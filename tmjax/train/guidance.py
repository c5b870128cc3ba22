"""Tying a target's span features to a source's: which layers, initial maps, and what batches need of the source.

A feature is the residual stream after a block at the last token of a whitespace-delimited span. Trainable linear maps
predict the source's features, standardised, from the target's; they begin as ridge regressions and are trained with
the model. Only the target's own forward pass is needed while training: source features are computed once and stored.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.activations.store import Activations
from tmjax.align.layer_plan import LayerPlan
from tmjax.errors import InputError
from tmjax.models.decoder import bind
from tmjax.models.spec import DecoderSpec
from tmjax.text.rows import TokenisedDocument
from tmjax.train.data import Guide, Piece
from tmjax.train.step import GUIDE
from tmjax.typing import Array, Params

#: The site whose activations are tied.
SITE = "resid"
#: Initial maps are fitted on at most so many spans.
MOST_ROWS = 20000


def by_depth(target_layers: int, source_layers: int) -> list[int]:
    """For each target layer l = 1..L the source layer round(l M / L), at least 1; the numbers returned count from 0."""
    return [max(1, round(layer * source_layers / target_layers)) - 1 for layer in range(1, target_layers + 1)]


def by_plan(plans: Sequence[LayerPlan]) -> list[int]:
    """For each target layer the source layer of largest weight in the layer plans P, averaged over projections."""
    return np.mean([plan.weights for plan in plans], axis=0).argmax(axis=1).tolist()


def last_tokens(documents: Sequence[TokenisedDocument]) -> list[TokenisedDocument]:
    """The same documents, every row reduced to the last of its tokens."""
    return [TokenisedDocument(item.ids, [[positions[-1]] for positions in item.rows]) for item in documents]


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every unit over rows [N, n]; a dead unit's is 1."""
    wide = np.asarray(values, np.float64)
    scale = wide.std(axis=0)
    return wide.mean(axis=0).astype(np.float32), np.where(scale > 1e-6, scale, 1.0).astype(np.float32)


def _root(metric: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semi-definite matrix whose diagonal is scaled to a mean of 1, float32."""
    values, vectors = np.linalg.eigh(np.asarray(metric, np.float64) * len(metric) / np.trace(metric))
    return ((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T).astype(np.float32)


@functools.partial(jax.jit, static_argnames="spec")
def _fisher(spec: DecoderSpec, params: Params, states_re: Array) -> Array:
    """Mean of J^T (diag p - p p^T) J over residual states [R, embed]; J are the derivatives of the logits."""
    decoder = bind(spec, params)

    def one(state: Array) -> Array:
        logits, along = jax.linearize(lambda x: decoder.logits(decoder.norm(x)), state)
        p = jax.nn.softmax(logits)
        columns = jax.vmap(along)(jnp.eye(len(state)))  # [embed, vocab]
        mean = columns @ p
        return (columns * p) @ columns.T - jnp.outer(mean, mean)

    return jnp.mean(jax.lax.map(one, states_re), axis=0)


def read_out_metric(spec: DecoderSpec, params: Params, values: Activations, *, most: int = 512) -> np.ndarray:
    """The Fisher information [k, k] of the read-out in the last residual state, over at most `most` stored rows."""
    held = values.site(SITE)[spec.layers - 1]
    chosen = np.linspace(0, len(held) - 1, min(most, len(held))).astype(int)
    return np.asarray(_fisher(spec, params, jnp.asarray(held[chosen], jnp.float32)), np.float64)


@dataclass(frozen=True)
class SourceFeatures:
    """Features of the source at the spans of documents that the target reads: gives batches their `Guide`.

    `values` are the source's stored activations, `layers` the source layer of each target layer, `positions` the
    position of every span's last token in the target's documents, `order` which source row belongs to which span (a
    control shuffles them).
    """

    values: Activations
    layers: Sequence[int]
    positions: Sequence[np.ndarray]
    first_row: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    order: np.ndarray | None = None
    metric: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        values: Activations,
        documents: Sequence[TokenisedDocument],
        layers: Sequence[int],
        order: np.ndarray | None = None,
        metric: np.ndarray | None = None,
    ) -> "SourceFeatures":
        """`documents` are the target's, as `pair_rows` gave them; see the class."""
        held = values.site(SITE)
        positions = [np.asarray([row[-1] for row in document.rows], np.int32) for document in documents]
        first = np.concatenate([[0], np.cumsum([len(spans) for spans in positions])])
        if first[-1] != held.shape[1]:
            raise InputError(f"{values.directory} holds {held.shape[1]} rows, the documents have {first[-1]} spans")
        mean, scale = (np.stack(part) for part in zip(*(_moments(held[layer]) for layer in layers), strict=True))
        roots = None if metric is None else np.stack([_root(metric * np.outer(each, each)) for each in scale])
        return cls(values, list(layers), positions, first, mean, scale, order, roots)

    def rows(self, number: np.ndarray) -> np.ndarray:
        """Standardised features [L, spans, k] float32 of the spans with these numbers."""
        number = number if self.order is None else self.order[number]
        held = self.values.site(SITE)
        chosen = np.stack([held[layer][number] for layer in self.layers])
        standard = (chosen - self.mean[:, None]) / self.scale[:, None]
        return standard if self.metric is None else standard @ self.metric

    def _within(self, piece: Piece) -> np.ndarray:
        """Which spans of a piece's document end among its inputs."""
        positions = self.positions[piece.document]
        return np.nonzero((positions >= piece.start) & (positions < piece.start + len(piece.ids) - 1))[0]

    def spans(self, piece: Piece) -> int:
        """How many spans a piece has."""
        return len(self._within(piece))

    def guide(self, pieces: Sequence[Piece], rows: int, spans: int) -> Guide:
        """The guide of a batch of `rows` rows, padded to `spans` spans each."""
        position, mask = np.zeros((rows, spans), np.int32), np.zeros((rows, spans), np.float32)
        source = np.zeros((len(self.layers), rows, spans, self.mean.shape[1]), np.float32)
        within = [self._within(piece) for piece in pieces]
        numbers = [self.first_row[piece.document] + found for piece, found in zip(pieces, within, strict=True)]
        values = self.rows(np.concatenate(numbers))
        start = 0
        for slot, (piece, found) in enumerate(zip(pieces, within, strict=True)):
            count = len(found)
            position[slot, :count] = self.positions[piece.document][found] - piece.start
            mask[slot, :count] = 1.0
            source[:, slot, :count] = values[:, start : start + count]
            start += count
        return Guide(position, mask, source)


@jax.jit
def _ridge(x: Array, y: Array, penalty: Array) -> Array:
    """W [k, n] of least mean |y - W x|^2 + penalty |W|^2 over rows x [N, n], y [N, k]."""
    highest = jax.lax.Precision.HIGHEST
    gram = jnp.matmul(x.T, x, precision=highest) / len(x) + penalty * jnp.eye(x.shape[1])
    return jax.scipy.linalg.solve(gram, jnp.matmul(x.T, y, precision=highest) / len(x), assume_a="pos").T


def start_maps(
    target: Activations, source: SourceFeatures, *, penalty: float = 0.1
) -> tuple[dict[str, Array], dict[str, Array], list[float]]:
    """Trained maps, frozen statistics of the target's features, variance of the source's features that each explains.

    `target` are activations of the untrained model at the same spans. Maps are `guide.weight` [L, k, n] and
    `guide.bias` [L, k], float32; `penalty` is in units of a standardised unit's variance.
    """
    held = target.site(SITE)
    chosen = np.linspace(0, held.shape[1] - 1, min(held.shape[1], MOST_ROWS)).astype(int)
    everything = source.rows(chosen)
    weights, biases, means, scales, explained = [], [], [], [], []
    for layer, y in enumerate(everything):
        mean, scale = _moments(held[layer])
        x = (held[layer][chosen] - mean) / scale
        centre = y.mean(axis=0)  # not zero where rows lie outside of what was standardised
        weight = np.asarray(_ridge(jnp.asarray(x), jnp.asarray(y - centre), jnp.float32(penalty)))
        error = np.mean(np.square(x @ weight.T + centre - y))
        explained.append(float(1 - error / np.mean(np.square(y))))
        for values, value in ((weights, weight), (biases, centre), (means, mean), (scales, scale)):
            values.append(value)
    trained = {f"{GUIDE}weight": np.stack(weights), f"{GUIDE}bias": np.stack(biases)}
    frozen = {f"{GUIDE}mean": np.stack(means), f"{GUIDE}scale": np.stack(scales)}
    as_arrays = ({path: jnp.asarray(value, jnp.float32) for path, value in part.items()} for part in (trained, frozen))
    return (*as_arrays, explained)
