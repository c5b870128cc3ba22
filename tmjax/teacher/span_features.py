"""Features of a model: the residual stream after each block at the last token of every whitespace-delimited span."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.activations.capture import CaptureOptions, capture
from tmjax.activations.store import Activations
from tmjax.align.layer_plan import LayerPlan
from tmjax.models.decoder import bind
from tmjax.models.spec import DecoderSpec
from tmjax.teacher.teacher_model import Teacher
from tmjax.text.rows import Rows, TokenisedDocument
from tmjax.typing import Array, Params

#: The site of the features.
SITE = "resid"


def by_depth(target_layers: int, source_layers: int) -> list[int]:
    """Pairs layers by relative depth.

    Args:
        target_layers: L.
        source_layers: M.

    Returns:
        For each target layer l = 1..L the source layer round(l M / L), at least 1; returned numbers count from 0.
    """
    return [max(1, round(layer * source_layers / target_layers)) - 1 for layer in range(1, target_layers + 1)]


def by_plan(plans: Sequence[LayerPlan]) -> list[int]:
    """Returns for each target layer the source layer of largest weight in the layer plans, averaged over them."""
    return np.mean([plan.weights for plan in plans], axis=0).argmax(axis=1).tolist()


def last_tokens(documents: Sequence[TokenisedDocument]) -> list[TokenisedDocument]:
    """Returns the same documents with every row reduced to the last of its tokens."""
    return [TokenisedDocument(item.ids, [[positions[-1]] for positions in item.rows]) for item in documents]


def capture_features(
    teacher: Teacher,
    rows: Rows,
    documents: Sequence[TokenisedDocument],
    directory: Path,
    layers: Sequence[int] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Stores the features of a model at the spans of texts.

    Args:
        teacher: The model.
        rows: The spans, as `pair_rows` gave them.
        documents: The texts in the model's own tokens.
        directory: An existing folder for the activation store.
        layers: The layers that are stored; None: all.
        progress: Called with (texts done, all texts).
    """
    capture(
        teacher.spec,
        teacher.params,
        rows,
        last_tokens(documents),
        directory,
        CaptureOptions(
            (SITE,), dtype=teacher.dtype, layout=teacher.layout, layers=None if layers is None else tuple(layers)
        ),
        progress=progress,
    )


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


def read_out_metric(spec: DecoderSpec, params: Params, values: Activations, *, max_rows: int = 512) -> np.ndarray:
    """Computes the Fisher information of a model's read-out in its last residual state.

    Args:
        spec: The architecture.
        params: The parameters.
        values: Stored features of the model.
        max_rows: The mean is over at most so many rows, evenly spaced.

    Returns:
        A matrix [k, k], float64.
    """
    states = values.site(SITE)[values.place_of(spec.layers - 1)]
    chosen = np.linspace(0, len(states) - 1, min(max_rows, len(states))).astype(int)
    return np.asarray(_fisher(spec, params, jnp.asarray(states[chosen], jnp.float32)), np.float64)
