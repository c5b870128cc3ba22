"""Next-token losses whose logits never exist whole: made, and differentiated, for some tokens at a time.

The gradient is computed with the loss, block by block, while the block's logits are at hand; so there are no more
matrix products than with whole logits, and nothing is computed twice (Wijmans et al. 2025, arXiv:2411.09009; Hsu et al.
2024, arXiv:2410.10989).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tmjax.models.decoder import scaled_logits
from tmjax.models.layers import einsum
from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array, ArrayLike

#: Logits are made for about this many entries (token x vocabulary) at a time,
LOGIT_ENTRIES = 2**21
#: but for at least so many tokens, however large the vocabulary: fewer would read the unembedding too often.
LEAST_TOKENS = 256
#: Probability below which the student's rest does not fall in the loss: nothing is divided by less.
LEAST_REST = 1e-6


class TeacherTokens(NamedTuple):
    """A teacher's distribution of the next token at every position of a batch.

    Attributes:
        ids_btk: The likeliest tokens, int32 [B, T, k].
        weight_btk: Their probabilities, float32 [B, T, k]; the remainder to 1 belongs to other tokens, together.
        mask_bt: 1 where there is a distribution, else 0; in a loss, its weight [B, T].
    """

    ids_btk: ArrayLike
    weight_btk: ArrayLike
    mask_bt: ArrayLike


def _slope(spec: DecoderSpec, capped: Array) -> Array | float:
    """Derivative of `scaled_logits`."""
    slope = 1.0 if spec.logit_cap is None else 1.0 - jnp.square(capped / spec.logit_cap)
    return slope * spec.logit_scale


def _pieces(batch: int, tokens: int, vocab: int) -> int:
    piece_tokens = max(-(-LEAST_TOKENS // batch), LOGIT_ENTRIES // (batch * vocab), 1)
    return -(-tokens // piece_tokens)


def _cut(x_bt: Array, pieces: int) -> Array:
    """`[B, T, ...]` as `[pieces, r, ...]`: pieces of the token axis, since the batch is what a mesh splits."""
    batch, tokens = x_bt.shape[:2]
    size = -(-tokens // pieces)
    padded = jnp.pad(x_bt, [(0, 0), (0, pieces * size - tokens), *[(0, 0)] * (x_bt.ndim - 2)])
    return jnp.moveaxis(padded.reshape(batch, pieces, size, *x_bt.shape[2:]), 1, 0).reshape(
        pieces, batch * size, *x_bt.shape[2:]
    )


class _Part(NamedTuple):
    """Tokens of one block: states [r, embed], labels [r], weight of their loss [r], a teacher's distributions."""

    states: Array
    labels: Array
    weight: Array
    teacher_ids: Array | None = None
    teacher: Array | None = None
    teacher_weight: Array | None = None


def _entropy(p: Array) -> Array:
    return jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0.0)


def _block(spec: DecoderSpec, head: Array, part: _Part, *, slopes: bool) -> tuple[Array, Array, Array | None]:
    """Weighted losses of a block of tokens, of labels and of a teacher, and the slope of their sum in the logits.

    The teacher's loss is the divergence KL(q | p) over the k tokens and all others together: q is known no finer.
    """
    logits = scaled_logits(spec, einsum("re,ve->rv", part.states, head.astype(part.states.dtype)))
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    nll = normaliser - jnp.take_along_axis(logits, part.labels[..., None], axis=-1)[..., 0]
    text, divergence = jnp.sum(nll * part.weight), jnp.zeros((), jnp.float32)
    slope = None
    if slopes:
        p = jnp.exp(logits - normaliser[..., None])
        hit = part.labels[..., None] == jnp.arange(spec.vocab)
        slope = (p - hit) * part.weight[..., None]
    if part.teacher is not None:
        log_p = jnp.take_along_axis(logits, part.teacher_ids, axis=-1) - normaliser[..., None]
        rest = jnp.maximum(1.0 - part.teacher.sum(-1), 0.0)
        # Tokens without weight are padding of the list: they belong to the rest.
        listed = jnp.where(part.teacher > 0, jnp.exp(log_p), 0.0)
        own_rest = jnp.maximum(1.0 - listed.sum(-1), LEAST_REST)
        cost = _entropy(part.teacher) - jnp.where(part.teacher > 0, part.teacher * log_p, 0.0)
        cost = cost.sum(-1) + _entropy(rest) - rest * jnp.log(own_rest)
        divergence = jnp.sum(cost * part.teacher_weight)
        if slopes:
            # q of an unlisted token is its share in the student's own rest: slope p - q.
            ratio = (rest / own_rest)[..., None]
            further = jnp.where(part.teacher > 0, listed * ratio - part.teacher, 0.0)
            row = jnp.arange(len(p))[:, None]
            slope = slope + (p * (1.0 - ratio) * part.teacher_weight[..., None]).at[row, part.teacher_ids].add(
                further * part.teacher_weight[..., None]
            )
    if slopes:
        slope = (slope * _slope(spec, logits)).astype(part.states.dtype)
    return text, divergence, slope


def _over(make: Callable[..., tuple], initial: tuple, parts: _Part) -> tuple[tuple, tuple]:
    """`lax.scan`, or one step without a loop."""
    if parts.states.shape[0] > 1:
        return jax.lax.scan(make, initial, parts)
    total, made = make(initial, jax.tree.map(lambda x: x[0], parts))
    return total, jax.tree.map(lambda x: x[None], made)


def _parts(
    spec: DecoderSpec, hidden: Array, labels: Array, weight: Array, teacher: TeacherTokens | None
) -> tuple[int, _Part]:
    count = _pieces(*labels.shape, spec.vocab)
    teacher_parts = (None, None, None) if teacher is None else teacher
    return count, jax.tree.map(lambda x: _cut(x, count), _Part(hidden, labels, weight, *teacher_parts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_losses(
    spec: DecoderSpec,
    head_ve: Array,
    hidden_bte: Array,
    labels_bt: Array,
    weight_bt: Array,
    teacher: TeacherTokens | None = None,
) -> tuple[Array, Array, Array]:
    """Sums weight x -ln p(label) and mask x KL(teacher | model) over the tokens of a batch.

    Differentiable in `head` and `hidden`; only the first result has a gradient.

    Args:
        spec: The architecture.
        head_ve: The unembedding [vocab, embed] in its own dtype.
        hidden_bte: Normed states [B, T, embed].
        labels_bt: The next tokens [B, T].
        weight_bt: Weights of the first loss [B, T].
        teacher: Distributions of the next token; its mask may hold any weights.

    Returns:
        The sum of both losses, the first and the second; float32, nats.
    """
    _, parts = _parts(spec, hidden_bte, labels_bt, weight_bt, teacher)

    def make(total: tuple[Array, Array], part: _Part) -> tuple[tuple[Array, Array], tuple]:
        text, divergence, _ = _block(spec, head_ve, part, slopes=False)
        return (total[0] + text, total[1] + divergence), ()

    zero = jnp.zeros((), jnp.float32)
    text, divergence = _over(make, (zero, zero), parts)[0]
    return text + divergence, text, divergence


def _forward(
    spec: DecoderSpec,
    head_ve: Array,
    hidden_bte: Array,
    labels_bt: Array,
    weight_bt: Array,
    teacher: TeacherTokens | None = None,
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    def make(total: tuple[Array, Array, Array], part: _Part) -> tuple[tuple[Array, Array, Array], Array]:
        text, divergence, slope = _block(spec, head_ve, part, slopes=True)
        d_head = einsum("rv,re->ve", slope, part.states).astype(jnp.float32)
        d_states = einsum("rv,ve->re", slope, head_ve.astype(part.states.dtype))
        return (total[0] + text, total[1] + divergence, total[2] + d_head), d_states

    count, parts = _parts(spec, hidden_bte, labels_bt, weight_bt, teacher)
    zero = jnp.zeros((), jnp.float32)
    (text, divergence, d_head), d_hidden = _over(make, (zero, zero, jnp.zeros(head_ve.shape, jnp.float32)), parts)
    batch, tokens, width = hidden_bte.shape
    d_hidden = jnp.moveaxis(d_hidden.reshape(count, batch, -1, width), 0, 1).reshape(batch, -1, width)[:, :tokens]
    slopes = (d_head.astype(head_ve.dtype), d_hidden.astype(hidden_bte.dtype))
    return (text + divergence, text, divergence), slopes


def _backward(
    _spec: DecoderSpec, stored: tuple[Array, Array], slopes: tuple[Array, Array, Array]
) -> tuple[Array, Array, None, None, None]:
    d_head, d_hidden = stored
    slope = slopes[0]
    return d_head * slope.astype(d_head.dtype), d_hidden * slope.astype(d_hidden.dtype), None, None, None


summed_losses.defvjp(_forward, _backward)


def summed_nll(spec: DecoderSpec, head_ve: Array, hidden_bte: Array, labels_bt: Array, weight_bt: Array) -> Array:
    """`summed_losses` of labels alone."""
    return summed_losses(spec, head_ve, hidden_bte, labels_bt, weight_bt)[0]
