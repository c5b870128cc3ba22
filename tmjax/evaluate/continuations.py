"""Log-likelihoods of continuations after contexts, and whether they are what the model would have written.

Requests that begin alike (the choices of one question, few-shot examples) are packed so that what they share is
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
    """What is predicted in a chunk: nodes [M] that predict; of each prediction [Q] which of these, label, request.

    Padding has the label -1; requests [R] of a chunk are numbered from 0.
    """

    nodes: ArrayLike
    place: ArrayLike
    label: ArrayLike
    request: ArrayLike


def _chunk(
    spec: DecoderSpec, params: Params, packed: Packed, told: Predictions, requests: int, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Log-likelihood [R] float32 and number of tokens that are not the likeliest [R] of a chunk's requests."""
    model = bind(spec, params)
    states = packed_hidden(model, packed, dtype)[told.nodes]
    count = states.shape[0]
    blocks = -(-count // max(LOGIT_NODES, LOGIT_ENTRIES // spec.vocab))
    at_once = -(-count // blocks)
    padded = jnp.pad(states, ((0, blocks * at_once - count), (0, 0))).reshape(blocks, at_once, -1)

    def block(states: Array) -> tuple[Array, Array]:
        logits = model.logits(states)
        return jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1)

    normaliser, likeliest = (x.reshape(-1) for x in jax.lax.map(block, padded))
    label = jnp.maximum(told.label, 0)
    gained = model.logits_of(states[told.place], label) - normaliser[told.place]
    real = told.label >= 0
    sums = jax.ops.segment_sum(jnp.where(real, gained, 0), told.request, requests)
    wrong = real & (likeliest[told.place] != label)
    missed = jax.ops.segment_sum(wrong.astype(jnp.int32), told.request, requests)
    return sums, missed


@functools.partial(jax.jit, static_argnames=("spec", "requests", "dtype"))
def continuation_sums(
    spec: DecoderSpec, params: Params, packed: Packed, told: Predictions, requests: int, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """`_chunk` of D chunks at once, [D, R] each: a leading axis that a mesh splits."""
    if told.label.shape[0] == 1:
        one = jax.tree.map(lambda x: x[0], (packed, told))
        return jax.tree.map(lambda x: x[None], _chunk(spec, params, *one, requests, dtype))
    return jax.vmap(lambda packed, told: _chunk(spec, params, packed, told, requests, dtype))(packed, told)


def _predictions(
    chunks: Chunks, texts: Sequence[int], wanted: Sequence[Continuation]
) -> tuple[Predictions, np.ndarray]:
    """Predictions of all chunks, [C, ...] each, and the number of the request [C, R] or -1; `texts` says whose inputs
    a request has.
    """
    lengths = [nodes.shape[1] for nodes in chunks.packed.texts]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    found: list[dict[str, list[int]]] = []
    askers: dict[int, list[int]] = {}
    for request, text in enumerate(texts):
        askers.setdefault(text, []).append(request)
    for chunk, owners in enumerate(chunks.owners):
        held: dict[str, list[int]] = {"nodes": [], "place": [], "label": [], "request": [], "asked": []}
        known: dict[int, int] = {}
        for row in np.nonzero(owners >= 0)[0].tolist():
            number = int(np.searchsorted(offsets, row, side="right")) - 1
            nodes = chunks.packed.texts[number][chunk, row - offsets[number]]
            for request in askers[int(owners[row])]:
                ids, scored = wanted[request]
                for position in range(len(ids) - 1 - scored, len(ids) - 1):
                    node = int(nodes[position])
                    held["place"].append(known.setdefault(node, len(known)))
                    held["label"].append(ids[position + 1])
                    held["request"].append(len(held["asked"]))
                held["asked"].append(request)
        held["nodes"] = list(known)
        found.append(held)

    def stacked(name: str, fill: int) -> np.ndarray:
        size = -(-max(len(held[name]) for held in found) // 8) * 8
        rows = [held[name] + [fill] * (size - len(held[name])) for held in found]
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

    def __call__(self, wanted: Sequence[Continuation]) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihood in nats [N] float64 of every continuation, and whether greedy decoding would write it [N].

        Raises InputError for a request without context or beyond the positions that a model learned, NonFiniteError if
        the model gives NaN.
        """
        if not wanted:
            return np.zeros(0), np.zeros(0, bool)
        self._check(wanted)
        sums, greedy = np.zeros(len(wanted)), np.zeros(len(wanted), bool)
        # Chunks of one shape hold rows of every length: few long requests would cost all chunks of short ones.
        scales = np.asarray([max(len(ids).bit_length(), SHORT_BITS) // 2 for ids, _ in wanted])
        for scale in np.unique(scales):
            members = np.nonzero(scales == scale)[0]
            sums[members], greedy[members] = self._alike([wanted[i] for i in members])
        if not np.isfinite(sums).all():
            raise NonFiniteError("the model's log-likelihoods hold NaN or infinity")
        return sums, greedy

    def _alike(self, wanted: Sequence[Continuation]) -> tuple[np.ndarray, np.ndarray]:
        """The same for requests of about one length, in one program."""
        inputs: dict[tuple[int, ...], int] = {}
        texts = [inputs.setdefault(ids[:-1], len(inputs)) for ids, _ in wanted]
        # `pack` leaves the last token of a text to be predicted; here that is looked up per request.
        whole = [(*ids, 0) for ids in inputs]
        devices = self.layout.batch_multiple
        chunks = pack(self.spec, whole, chunk_tokens=self.batch_tokens, alike=True, multiple=devices)
        told, asked = _predictions(chunks, texts, wanted)
        pending = []
        for start in range(0, len(asked), devices):
            part = jax.tree.map(lambda x, s=start: self.layout.place_batch(x[s : s + devices]), (chunks.packed, told))
            pending.append(continuation_sums(self.spec, self.params, *part, asked.shape[1], self.dtype))
        values, missed = (np.concatenate(parts) for parts in zip(*to_host(pending), strict=True))
        sums, greedy = np.zeros(len(wanted)), np.zeros(len(wanted), bool)
        real = asked >= 0
        sums[asked[real]], greedy[asked[real]] = values[real], missed[real] == 0
        return sums, greedy

    def _check(self, wanted: Sequence[Continuation]) -> None:
        longest = max(len(ids) for ids, _ in wanted) - 1
        if self.spec.learned_positions and longest > self.spec.max_positions:
            raise InputError(
                f"a request has {longest} tokens before its last, the model learned {self.spec.max_positions} positions"
            )
        if not all(1 <= scored < len(ids) for ids, scored in wanted):
            raise InputError("every continuation needs at least one token, after a context of at least one")
        largest = max(max(ids) for ids, _ in wanted)
        if largest >= self.spec.vocab:
            raise InputError(
                f"the tokenizer gives id {largest}, but the model's vocabulary has {self.spec.vocab} entries"
            )
