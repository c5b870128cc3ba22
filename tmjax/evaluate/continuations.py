"""Log-likelihoods of continuations after contexts, and whether greedy decoding gives them.

Requests that begin alike (the choices of one question, few-shot examples) are packed so that their common prefix is
computed once; logits are made only where a continuation is predicted, a block at a time. Requests of a call whose
lengths are within a factor of four take one program.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.errors import InputError, NonFiniteError
from tmjax.evaluate.packing import LOGIT_ENTRIES, LOGIT_NODES, Chunks, pack
from tmjax.models.decoder import bind
from tmjax.models.packed import Packed, packed_hidden
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import Layout
from tmjax.typing import Array, ArrayLike, Params, pytree_dataclass

#: Nodes per chunk on a CPU, whose caches hold the activations of about so many, and on accelerators.
CPU_TOKENS, ACCELERATOR_TOKENS = 1536, 16384
#: Requests below 2^7 tokens are of one scale; beyond, a scale spans a factor of four.
SHORT_BITS = 6


class Continuation(NamedTuple):
    """Token ids of a context and its continuation together, and how many of the last ones are scored."""

    ids: tuple[int, ...]
    scored: int


@pytree_dataclass
@dataclass(frozen=True)
class Predictions:
    """Predictions of a chunk: nodes [M] that predict; for each prediction [Q] the index of its node, label, request.

    Padding has the label -1; requests [R] of a chunk are numbered from 0.
    """

    nodes: ArrayLike
    place: ArrayLike
    label: ArrayLike
    request: ArrayLike


def _chunk(
    spec: DecoderSpec, params: Params, packed: Packed, predictions: Predictions, requests: int, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Log-likelihood [R] float32 and number of tokens that are not the likeliest [R] of a chunk's requests."""
    model = bind(spec, params)
    states = packed_hidden(model, packed, dtype)[predictions.nodes]
    count = states.shape[0]
    blocks = -(-count // max(LOGIT_NODES, LOGIT_ENTRIES // spec.vocab))
    at_once = -(-count // blocks)
    padded = jnp.pad(states, ((0, blocks * at_once - count), (0, 0))).reshape(blocks, at_once, -1)

    def block(states: Array) -> tuple[Array, Array]:
        logits = model.logits(states)
        return jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1)

    normaliser, likeliest = (x.reshape(-1) for x in jax.lax.map(block, padded))
    label = jnp.maximum(predictions.label, 0)
    gained = model.logits_of(states[predictions.place], label) - normaliser[predictions.place]
    real = predictions.label >= 0
    sums = jax.ops.segment_sum(jnp.where(real, gained, 0), predictions.request, requests)
    wrong = real & (likeliest[predictions.place] != label)
    missed = jax.ops.segment_sum(wrong.astype(jnp.int32), predictions.request, requests)
    return sums, missed


@functools.partial(jax.jit, static_argnames=("spec", "requests", "dtype"))
def continuation_sums(
    spec: DecoderSpec, params: Params, packed: Packed, predictions: Predictions, requests: int, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Computes `_chunk` of D chunks at once, [D, R] each; a mesh splits the leading axis."""
    if predictions.label.shape[0] == 1:
        one = jax.tree.map(lambda x: x[0], (packed, predictions))
        return jax.tree.map(lambda x: x[None], _chunk(spec, params, *one, requests, dtype))
    return jax.vmap(lambda packed, predictions: _chunk(spec, params, packed, predictions, requests, dtype))(
        packed, predictions
    )


def _predictions(
    chunks: Chunks, texts: Sequence[int], continuations: Sequence[Continuation]
) -> tuple[Predictions, np.ndarray]:
    """Lists the predictions of all chunks, [C, ...] each, and the number of the request [C, R] or -1.

    `texts` gives the number of each request's input.
    """
    lengths = [nodes.shape[1] for nodes in chunks.packed.texts]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    by_chunk: list[dict[str, list[int]]] = []
    askers: dict[int, list[int]] = {}
    for request, text in enumerate(texts):
        askers.setdefault(text, []).append(request)
    for chunk, owners in enumerate(chunks.owners):
        columns: dict[str, list[int]] = {"nodes": [], "place": [], "label": [], "request": [], "asked": []}
        known: dict[int, int] = {}
        for row in np.nonzero(owners >= 0)[0].tolist():
            number = int(np.searchsorted(offsets, row, side="right")) - 1
            nodes = chunks.packed.texts[number][chunk, row - offsets[number]]
            for request in askers[int(owners[row])]:
                ids, scored = continuations[request]
                for position in range(len(ids) - 1 - scored, len(ids) - 1):
                    node = int(nodes[position])
                    columns["place"].append(known.setdefault(node, len(known)))
                    columns["label"].append(ids[position + 1])
                    columns["request"].append(len(columns["asked"]))
                columns["asked"].append(request)
        columns["nodes"] = list(known)
        by_chunk.append(columns)

    def stacked(name: str, fill: int) -> np.ndarray:
        size = -(-max(len(columns[name]) for columns in by_chunk) // 8) * 8
        rows = [columns[name] + [fill] * (size - len(columns[name])) for columns in by_chunk]
        return np.asarray(rows, np.int32)

    fills = {"nodes": 0, "place": 0, "label": -1, "request": 0}
    return Predictions(**{name: stacked(name, fill) for name, fill in fills.items()}), stacked("asked", -1)


class ContinuationScorer:
    """Scores continuations under one model; requests of all lengths, in few programs a call."""

    def __init__(
        self,
        spec: DecoderSpec,
        params: Params,
        *,
        batch_tokens: int | None = None,
        dtype: jnp.dtype = jnp.float32,
        layout: Layout | None = None,
    ) -> None:
        self.spec, self.params, self.dtype = spec, params, dtype
        self.layout = layout or Layout()
        cpu = jax.devices()[0].platform == "cpu"
        self.batch_tokens = batch_tokens or (CPU_TOKENS if cpu else ACCELERATOR_TOKENS)

    def __call__(self, continuations: Sequence[Continuation]) -> tuple[np.ndarray, np.ndarray]:
        """Computes the log-likelihood in nats [N] float64 of continuations, and whether greedy decoding gives each [N].

        Raises InputError for a request without context or beyond the positions that a model learned, NonFiniteError if
        the model gives NaN.
        """
        if not continuations:
            return np.zeros(0), np.zeros(0, bool)
        self._check(continuations)
        sums, greedy = np.zeros(len(continuations)), np.zeros(len(continuations), bool)
        # Chunks of one shape hold rows of every length: few long requests would cost all chunks of short ones.
        scales = np.asarray([max(len(ids).bit_length(), SHORT_BITS) // 2 for ids, _ in continuations])
        for scale in np.unique(scales):
            members = np.nonzero(scales == scale)[0]
            sums[members], greedy[members] = self._alike([continuations[i] for i in members])
        if not np.isfinite(sums).all():
            raise NonFiniteError("the model's log-likelihoods hold NaN or infinity")
        return sums, greedy

    def _alike(self, continuations: Sequence[Continuation]) -> tuple[np.ndarray, np.ndarray]:
        """Scores requests of about one length in one program."""
        inputs: dict[tuple[int, ...], int] = {}
        texts = [inputs.setdefault(ids[:-1], len(inputs)) for ids, _ in continuations]
        # `pack` leaves the last token of a text to be predicted; the label is looked up per request instead.
        whole = [(*ids, 0) for ids in inputs]
        devices = self.layout.batch_multiple
        chunks = pack(self.spec, whole, chunk_tokens=self.batch_tokens, alike=True, multiple=devices)
        predictions, asked = _predictions(chunks, texts, continuations)
        pending = []
        for start in range(0, len(asked), devices):
            part = jax.tree.map(
                lambda x, s=start: self.layout.place_batch(x[s : s + devices]), (chunks.packed, predictions)
            )
            pending.append(continuation_sums(self.spec, self.params, *part, asked.shape[1], self.dtype))
        values, missed = (np.concatenate(parts) for parts in zip(*to_host(pending), strict=True))
        sums, greedy = np.zeros(len(continuations)), np.zeros(len(continuations), bool)
        real = asked >= 0
        sums[asked[real]], greedy[asked[real]] = values[real], missed[real] == 0
        return sums, greedy

    def _check(self, continuations: Sequence[Continuation]) -> None:
        longest = max(len(ids) for ids, _ in continuations) - 1
        if self.spec.bound and longest > self.spec.max_positions:
            raise InputError(f"a request has {longest} tokens before its last, {self.spec.bound}")
        if not all(1 <= scored < len(ids) for ids, scored in continuations):
            raise InputError("every continuation needs at least one token, after a context of at least one")
        largest = max(max(ids) for ids, _ in continuations)
        if largest >= self.spec.vocab:
            raise InputError(
                f"the tokenizer gives id {largest}, but the model's vocabulary has {self.spec.vocab} entries"
            )
