"""Bits per byte: comparable between tokenizers (DESIGN section 6).

A document is scored as `[BOS, or EOS if there is none] + ids + [EOS]`: the sum of the negative log-likelihoods of all
tokens after the first, divided by ln 2 and by the document's UTF-8 bytes. A document longer than the model's context is
scored in consecutive windows that share one token, so every token after the first is scored exactly once.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.activations.batches import bucketed
from tmjax.convert.model import Model
from tmjax.errors import InputError, NonFiniteError
from tmjax.hub.texts import Texts
from tmjax.hub.tokenizer import TextTokenizer, load_tokenizer
from tmjax.models.decoder import bind
from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array, Params

#: Logits are made for about this many entries (token x vocabulary) at a time.
LOGIT_ENTRIES = 2**23


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def sequence_nll(spec: DecoderSpec, params: Params, ids_bt: Array, length_b: Array, dtype: jnp.dtype) -> Array:
    """Sum over each right-padded row of -ln p(token | tokens before), all but its first token: [B] float32."""
    model = bind(spec, params)
    hidden, _ = model.hidden(ids_bt[:, :-1], dtype, (), lambda x: x)

    def row(item: tuple[Array, Array, Array]) -> Array:
        states, labels, length = item
        logits = model.logits(states)
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(jnp.arange(nll.shape[0]) < length - 1, nll, 0.0))

    at_once = max(1, LOGIT_ENTRIES // (ids_bt.shape[1] * spec.vocab))
    return jax.lax.map(row, (hidden, ids_bt[:, 1:], length_b), batch_size=at_once)


@dataclass(frozen=True)
class Scores:
    """Negative log-likelihood in nats, UTF-8 bytes and scored tokens of every document, [D] each."""

    nll: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """Sum of bits over sum of bytes."""
        return float(self.nll.sum() / math.log(2) / self.bytes.sum())


@dataclass(frozen=True)
class Windows:
    """Texts cut to a model's context: (document, token ids) of every piece; UTF-8 bytes and scored tokens [D] each."""

    pieces: list[tuple[int, list[int]]]
    bytes: np.ndarray
    tokens: np.ndarray


def windows(spec: DecoderSpec, tokenizer: TextTokenizer, texts: Texts, max_tokens: int | None = None) -> Windows:
    """Cuts documents longer than `max_tokens` (the model's context) into windows that share one token.

    Raises InputError if the windows or the tokenizer do not suit the model.
    """
    window = max_tokens or spec.max_positions
    if window < 2:
        raise InputError(f"evaluation.max_tokens is {window}; scoring needs windows of at least 2 tokens")
    if spec.learned_positions and window > spec.max_positions:
        raise InputError(
            f"evaluation.max_tokens is {window}, the model learned {spec.max_positions} positions; lower it"
        )
    documents = [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(texts.texts)]
    largest = max(map(max, documents))
    if largest >= spec.vocab:
        raise InputError(f"the tokenizer gives id {largest}, but the model's vocabulary has {spec.vocab} entries")
    pieces = [
        (number, ids[start : start + window])
        for number, ids in enumerate(documents)
        for start in range(0, len(ids) - 1, window - 1)
    ]
    return Windows(
        pieces,
        np.asarray([len(text.encode()) for text in texts.texts]),
        np.asarray([len(ids) - 1 for ids in documents]),
    )


class Scorer:
    """Texts tokenised, batched and placed once, to be scored under many parameter values of one architecture."""

    def __init__(
        self,
        spec: DecoderSpec,
        tokenizer: TextTokenizer,
        texts: Texts,
        *,
        batch_tokens: int = 4096,
        max_tokens: int | None = None,
        dtype: jnp.dtype = jnp.float32,
        place: Callable[[np.ndarray], Array] = jnp.asarray,
        multiple: int = 1,
    ) -> None:
        self.spec, self.dtype = spec, dtype
        cut = windows(spec, tokenizer, texts, max_tokens)
        self.bytes, self.tokens, pieces = cut.bytes, cut.tokens, cut.pieces
        self._batches = []
        for batch in bucketed([len(ids) for _, ids in pieces], batch_tokens=batch_tokens, multiple=multiple):
            ids_bt, length_b = np.zeros((batch.size, batch.tokens), np.int32), np.ones(batch.size, np.int32)
            for slot, piece in enumerate(batch.documents):
                ids = pieces[piece][1]
                ids_bt[slot, : len(ids)], length_b[slot] = ids, len(ids)
            owner = np.asarray([pieces[piece][0] for piece in batch.documents])
            self._batches.append((place(ids_bt), place(length_b), owner))

    def __call__(self, params: Params) -> Scores:
        """Scores of every document; raises NonFiniteError if the model gives NaN."""
        pending = [
            (owner, sequence_nll(self.spec, params, ids, length, self.dtype)) for ids, length, owner in self._batches
        ]
        nll = np.zeros(len(self.bytes))
        for owner, values in pending:
            np.add.at(nll, owner, np.asarray(values, np.float64)[: len(owner)])
        if not np.isfinite(nll).all():
            raise NonFiniteError("the model's log-likelihoods hold NaN or infinity")
        return Scores(nll, self.bytes, self.tokens)


def evaluate(model: Model, texts: Texts, **options: Any) -> Scores:
    """Scores of a loaded model, with its own tokenizer; `options` are those of `Scorer`."""
    return Scorer(model.spec, load_tokenizer(model.directory), texts, **options)(model.params)
