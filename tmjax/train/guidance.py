"""Tying a target's span features to a source's: initial maps, and the source features of every batch.

Trainable linear maps predict the source's features (`teacher.features`), standardised, from the target's; they begin as
ridge regressions and are trained with the model. Only the target's own forward pass is needed while training: source
features are computed once and stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.activations.store import Activations
from tmjax.errors import InputError
from tmjax.teacher.span_features import SITE
from tmjax.text.rows import TokenisedDocument
from tmjax.train.data import Guide, Piece
from tmjax.train.optimizer import GUIDE
from tmjax.typing import Array

#: Initial maps are fitted on at most so many spans.
MAX_ROWS = 20000


#: Rows whose moments are summed at a time in float64.
BLOCK_ROWS = 65536
#: Means and standard deviations of units [L, n].
Moments = tuple[np.ndarray, np.ndarray]


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every unit over rows [N, n]; a dead unit's is 1."""
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(values), BLOCK_ROWS)]
    mean = sum(np.asarray(values[block], np.float64).sum(axis=0) for block in blocks) / len(values)
    squares = sum(np.square(np.asarray(values[block], np.float64) - mean).sum(axis=0) for block in blocks)
    scale = np.sqrt(squares / len(values))
    return mean.astype(np.float32), np.where(scale > 1e-6, scale, 1.0).astype(np.float32)


def moments_of(values: Activations, layers: Sequence[int]) -> Moments:
    """Computes the moments of stored features.

    Args:
        values: The stored features of a model.
        layers: Layers of the model; one that is named again is read once.

    Returns:
        Means and standard deviations [len(layers), units] float32; the deviation of a dead unit is 1.
    """
    states = values.site(SITE)
    once = {layer: _moments(states[values.place_of(layer)]) for layer in dict.fromkeys(layers)}
    means, scales = zip(*(once[layer] for layer in layers), strict=True)
    return np.stack(means), np.stack(scales)


def _root(metric: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semi-definite matrix whose diagonal is scaled to a mean of 1, float32."""
    values, vectors = np.linalg.eigh(np.asarray(metric, np.float64) * len(metric) / np.trace(metric))
    return ((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T).astype(np.float32)


@dataclass(frozen=True)
class SourceFeatures:
    """Features of the source at the spans of the target's documents; makes the `Guide` of batches.

    Attributes:
        values: The source's stored features.
        layers: The source layer of each target layer.
        positions: Of every document, the positions of the spans' last tokens in the target's tokens.
        first_row: The first row of every document.
        mean: Mean of every unit [L, k].
        scale: Standard deviation of every unit [L, k].
        order: The source row of every span, if not the span's own.
        metric: Root of the metric of errors, in standardised units [L, k, k].
        own_rows: Returns which rows of a batch of that many this process has; features of others are not read.
    """

    values: Activations
    layers: Sequence[int]
    positions: Sequence[np.ndarray]
    first_row: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    order: np.ndarray | None = None
    metric: np.ndarray | None = None
    own_rows: Callable[[int], np.ndarray] | None = None

    @classmethod
    def of(
        cls,
        values: Activations,
        documents: Sequence[TokenisedDocument],
        layers: Sequence[int],
        metric: np.ndarray | None = None,
        *,
        moments: Moments | None = None,
    ) -> Self:
        """Standardises stored features.

        Args:
            values: The source's stored features.
            documents: The target's documents, as `pair_rows` gave them.
            layers: The source layer of each target layer.
            metric: Metric of errors in the source's residual state [k, k].
            moments: `moments_of` these layers; computed unless given.

        Raises:
            InputError: The store has another number of rows than the documents have spans.
        """
        states = values.site(SITE)
        positions = [np.asarray([row[-1] for row in document.rows], np.int32) for document in documents]
        first = np.concatenate([[0], np.cumsum([len(spans) for spans in positions])])
        if first[-1] != states.shape[1]:
            raise InputError(f"{values.directory} holds {states.shape[1]} rows, the documents have {first[-1]} spans")
        mean, scale = moments_of(values, layers) if moments is None else moments
        roots = None if metric is None else np.stack([_root(metric * np.outer(each, each)) for each in scale])
        return cls(values, list(layers), positions, first, mean, scale, metric=roots)

    def reordered(self, order: np.ndarray) -> Self:
        """Returns the same spans with the source features of the rows `order` [N]."""
        return replace(self, order=order)

    def rows(self, number: np.ndarray) -> np.ndarray:
        """Returns standardised features [L, spans, k] float32 of the spans with these numbers."""
        number = number if self.order is None else self.order[number]
        chosen = self._stored(number)
        standard = (chosen - self.mean[:, None]) / self.scale[:, None]
        return standard if self.metric is None else standard @ self.metric

    def _stored(self, number: np.ndarray) -> np.ndarray:
        """Reads rows of the store [L, rows, k]; neighbours, such as a document's, are one read."""
        states = self.values.site(SITE)
        ordered, inverse = np.unique(number, return_inverse=True)
        runs = np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1) if len(ordered) else []
        result = np.empty((len(self.layers), len(ordered), states.shape[2]), np.float32)
        for layer, values in zip(self.layers, result, strict=True):
            stored, start = states[self.values.place_of(layer)], 0
            for run in runs:
                values[start : start + len(run)] = stored[run[0] : run[-1] + 1]
                start += len(run)
        return result[:, inverse]

    def _within(self, piece: Piece) -> np.ndarray:
        """Returns the spans of a piece's document that end among its inputs."""
        positions = self.positions[piece.document]
        return np.nonzero((positions >= piece.start) & (positions < piece.start + len(piece.ids) - 1))[0]

    def spans(self, piece: Piece) -> int:
        """Counts the spans of a piece."""
        return len(self._within(piece))

    def guide(self, pieces: Sequence[Piece], rows: int, spans: int) -> Guide:
        """Returns the guide of a batch of `rows` rows, padded to `spans` spans each."""
        position, mask = np.zeros((rows, spans), np.int32), np.zeros((rows, spans), np.float32)
        source = np.zeros((len(self.layers), rows, spans, self.mean.shape[1]), np.float32)
        within = [self._within(piece) for piece in pieces]
        numbers = [self.first_row[piece.document] + own for piece, own in zip(pieces, within, strict=True)]
        own_rows = np.ones(rows, bool) if self.own_rows is None else self.own_rows(rows)
        read = [each for each, own in zip(numbers, own_rows, strict=False) if own]
        values = self.rows(np.concatenate([np.zeros(0, int), *read]))
        start = 0
        for slot, (piece, own) in enumerate(zip(pieces, within, strict=True)):
            count = len(own)
            position[slot, :count] = self.positions[piece.document][own] - piece.start
            mask[slot, :count] = 1.0
            if own_rows[slot]:
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
    target: Activations, source: SourceFeatures, *, penalty: float = 0.1, moments: Moments | None = None
) -> tuple[dict[str, Array], dict[str, Array], list[float]]:
    """Fits the initial maps from the target's features to the source's by ridge regression.

    Args:
        target: Features of the untrained model at the same spans.
        source: Features of the source.
        penalty: Ridge penalty, in units of a standardised unit's variance.
        moments: Moments of the target's features; computed unless given.

    Returns:
        Trained maps `guide.weight` [L, k, n] and `guide.bias` [L, k]; frozen statistics of the target's features; part
        of the source's variance that each map explains. All arrays are float32.
    """
    states = target.site(SITE)
    chosen = np.linspace(0, states.shape[1] - 1, min(states.shape[1], MAX_ROWS)).astype(int)
    everything = source.rows(chosen)
    weights, biases, means, scales, explained = [], [], [], [], []
    target_moments = moments_of(target, range(len(everything))) if moments is None else moments
    for layer, (y, mean, scale) in enumerate(zip(everything, *target_moments, strict=True)):
        x = (states[layer][chosen] - mean) / scale
        centre = y.mean(axis=0)  # not zero where the fit reads a part of the rows
        weight = np.asarray(_ridge(jnp.asarray(x), jnp.asarray(y - centre), jnp.float32(penalty)))
        error = np.mean(np.square(x @ weight.T + centre - y))
        explained.append(float(1 - error / np.mean(np.square(y))))
        for values, value in ((weights, weight), (biases, centre), (means, mean), (scales, scale)):
            values.append(value)
    trained = {f"{GUIDE}weight": np.stack(weights), f"{GUIDE}bias": np.stack(biases)}
    frozen = {f"{GUIDE}mean": np.stack(means), f"{GUIDE}scale": np.stack(scales)}
    as_arrays = ({path: jnp.asarray(value, jnp.float32) for path, value in part.items()} for part in (trained, frozen))
    return (*as_arrays, explained)
