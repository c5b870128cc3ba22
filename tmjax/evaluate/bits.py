"""Bits per byte: comparable between tokenizers (DESIGN section 6).

A document is scored as `[BOS, or EOS if there is none] + ids + [EOS]`: the sum of the negative log-likelihoods of all
tokens after the first, divided by ln 2 and by the document's UTF-8 bytes. Bytes that its tokens do not tell, under an
unknown token or dropped by the tokenizer, are charged with 8 bits each (`hub.unknown`). A document longer than the
model's context is scored in consecutive windows that share one token, so every token after the first is scored exactly
once.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tmjax.activations.joined import Joined, join, run_joined
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError, NonFiniteError
from tmjax.models.decoder import ForwardPlan, bind
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import Layout
from tmjax.text.documents import Texts
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.text.unknown import Hidden, hidden_bytes, hidden_nats
from tmjax.typing import Array, Params

#: Logits are made for about this many entries (token x vocabulary) at a time.
LOGIT_ENTRIES = 2**21
#: Smallest number of tokens at a time, however large the vocabulary: fewer would read the unembedding too often.
LEAST_ROWS = 512


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "mesh"))
def token_nll(spec: DecoderSpec, params: Params, batch: Joined, dtype: jnp.dtype, mesh: Mesh | None = None) -> Array:
    """-ln p(next token | tokens before it in its text) [B, T] float32, 0 where no token follows."""
    model = bind(spec, params)
    hidden = run_joined(model, batch, ForwardPlan(dtype, mesh=mesh)).hidden
    rows, tokens, _ = hidden.shape
    # Pieces of the token axis, not of the batch: the batch is what a mesh splits.
    piece_tokens = max(-(-LEAST_ROWS // rows), LOGIT_ENTRIES // (rows * spec.vocab))
    pieces = -(-tokens // piece_tokens)
    size = -(-tokens // pieces)

    def cut(x_bt: Array) -> Array:
        padded = jnp.pad(x_bt, [(0, 0), (0, pieces * size - tokens), *[(0, 0)] * (x_bt.ndim - 2)])
        return jnp.moveaxis(padded.reshape(rows, pieces, size, *x_bt.shape[2:]), 1, 0)

    def piece(item: tuple[Array, Array]) -> Array:
        states, labels = item
        logits = model.logits(states)
        chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(labels >= 0, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)

    nll = jax.lax.map(piece, (cut(hidden), cut(jnp.asarray(batch.label))))
    return jnp.moveaxis(nll, 0, 1).reshape(rows, -1)[:, :tokens]


@dataclass(frozen=True)
class Scores:
    """Negative log-likelihood in nats, UTF-8 bytes and scored tokens of every document, [D] each.

    `hidden`: bytes that the tokens do not encode, charged to `nll`, and bytes that they encode in a changed form.
    """

    nll: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    hidden: Hidden | None = None

    @property
    def bits_per_byte(self) -> float:
        """Sum of bits over sum of bytes."""
        return float(self.nll.sum() / math.log(2) / self.bytes.sum())

    @property
    def unknown_share(self) -> float:
        """Part of the bytes that the tokens do not tell."""
        return 0.0 if self.hidden is None else float(self.hidden.unknown.sum() / self.bytes.sum())

    @property
    def changed_share(self) -> float:
        """Part of the bytes whose characters the tokenizer changes before it reads them."""
        return 0.0 if self.hidden is None else float(self.hidden.changed.sum() / self.bytes.sum())


@dataclass(frozen=True)
class Windows:
    """Texts cut to a model's context: (document, token ids) of every piece; UTF-8 bytes and scored tokens [D] each."""

    pieces: list[tuple[int, list[int]]]
    bytes: np.ndarray
    tokens: np.ndarray
    hidden: Hidden

    def scores(self, nll: np.ndarray) -> Scores:
        """Scores of documents [D] whose tokens have this negative log-likelihood: hidden bytes are charged."""
        return Scores(nll + hidden_nats(self.hidden.unknown), self.bytes, self.tokens, self.hidden)


def windows(spec: DecoderSpec, tokenizer: TextTokenizer, texts: Texts, max_tokens: int | None = None) -> Windows:
    """Cuts documents longer than `max_tokens` (the model's context) into windows that share one token.

    Raises InputError if the windows or the tokenizer do not suit the model.
    """
    window = max_tokens or spec.max_positions
    if window < 2:
        raise InputError(f"evaluation.max_tokens is {window}; scoring needs windows of at least 2 tokens")
    if spec.bound and window > spec.max_positions:
        raise InputError(f"evaluation.max_tokens is {window}, {spec.bound}; lower it")
    encodings = tokenizer.encode(texts.texts)
    documents = [tokenizer.document(encoding.ids) for encoding in encodings]
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
        hidden_bytes(tokenizer, texts.texts, encodings),
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
        layout: Layout | None = None,
    ) -> None:
        layout = layout or Layout()
        self.spec, self.dtype, self.mesh = spec, dtype, layout.mesh
        self._cut = cut = windows(spec, tokenizer, texts, max_tokens)
        self.bytes, self.tokens, pieces = cut.bytes, cut.tokens, cut.pieces
        self._batches = []
        for batch in join(spec, [ids for _, ids in pieces], batch_tokens, layout):
            real = np.nonzero(batch.text >= 0)
            owner = np.asarray([number for number, _ in pieces])[batch.text[real]]
            self._batches.append((Joined(*map(layout.place_batch, batch)), real, owner))

    def __call__(self, params: Params) -> Scores:
        """Scores of every document; raises NonFiniteError if the model gives NaN."""
        pending = [token_nll(self.spec, params, batch, self.dtype, self.mesh) for batch, _, _ in self._batches]
        nll = np.zeros(len(self.bytes))
        for (_, real, owner), values in zip(self._batches, to_host(pending), strict=True):
            np.add.at(nll, owner, values[real].astype(np.float64))
        if not np.isfinite(nll).all():
            raise NonFiniteError("the model's log-likelihoods hold NaN or infinity")
        return self._cut.scores(nll)


def evaluate(
    model: Model,
    texts: Texts,
    *,
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout | None = None,
) -> Scores:
    """Scores a loaded model, with its own tokenizer, on held-out texts.

    Args:
        model: The model.
        texts: Held-out texts.
        batch_tokens: Tokens of a batch.
        max_tokens: Longest window of tokens; the model's context unless given.
        dtype: Dtype that the forward pass computes in.
        layout: Device mesh; one device unless given.

    Returns:
        Negative log-likelihood, bytes and tokens per document; `bits_per_byte` of all.

    Raises:
        InputError: The windows or the tokenizer do not suit the model.
        NonFiniteError: The model gives NaN or infinity.
    """
    tokenizer = load_tokenizer(model.directory, model.spec.vocab)
    scorer = Scorer(
        model.spec, tokenizer, texts, batch_tokens=batch_tokens, max_tokens=max_tokens, dtype=dtype, layout=layout
    )
    return scorer(model.params)
