"""Next-token cross entropy whose logits never exist whole: made, and differentiated, for some tokens at a time.

The gradient is computed with the loss, block by block, while the block's logits are at hand; so there are no more
matrix products than with whole logits, and nothing is computed twice (Wijmans et al. 2025, arXiv:2411.09009; Hsu et al.
2024, arXiv:2410.10989).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tmjax.models.decoder import scaled_logits
from tmjax.models.layers import einsum
from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array

#: Logits are made for about this many entries (token x vocabulary) at a time,
LOGIT_ENTRIES = 2**21
#: but for at least so many tokens, however large the vocabulary: fewer would read the unembedding too often.
LEAST_TOKENS = 256


def _slope(spec: DecoderSpec, capped: Array) -> Array | float:
    """Derivative of `scaled_logits`."""
    slope = 1.0 if spec.logit_cap is None else 1.0 - jnp.square(capped / spec.logit_cap)
    return slope * spec.logit_scale


def _pieces(batch: int, tokens: int, vocab: int) -> int:
    most = max(-(-LEAST_TOKENS // batch), LOGIT_ENTRIES // (batch * vocab), 1)
    return -(-tokens // most)


def _cut(x_bt: Array, pieces: int) -> Array:
    """`[B, T, ...]` as `[pieces, r, ...]`: pieces of the token axis, since the batch is what a mesh splits."""
    batch, tokens = x_bt.shape[:2]
    size = -(-tokens // pieces)
    padded = jnp.pad(x_bt, [(0, 0), (0, pieces * size - tokens), *[(0, 0)] * (x_bt.ndim - 2)])
    return jnp.moveaxis(padded.reshape(batch, pieces, size, *x_bt.shape[2:]), 1, 0).reshape(
        pieces, batch * size, *x_bt.shape[2:]
    )


def _block(spec: DecoderSpec, head: Array, states: Array, labels: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Weighted loss of a block of tokens [r], its logits, and their log-normalisers."""
    logits = scaled_logits(spec, einsum("re,ve->rv", states, head.astype(states.dtype)))
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    nll = normaliser - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * weight), logits, normaliser


def _over(make: Callable[..., tuple], initial: tuple, parts: tuple[Array, ...]) -> tuple[tuple, tuple]:
    """`lax.scan`, or one step without a loop."""
    if parts[0].shape[0] > 1:
        return jax.lax.scan(make, initial, parts)
    total, made = make(initial, tuple(x[0] for x in parts))
    return total, jax.tree.map(lambda x: x[None], made)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_nll(spec: DecoderSpec, head_ve: Array, hidden_bte: Array, labels_bt: Array, weight_bt: Array) -> Array:
    """Sum of weight x -ln p(label): float32. `hidden` are normed states, `head` the unembedding in its own dtype.

    Differentiable in `head` and `hidden`.
    """

    def make(total: Array, part: tuple[Array, ...]) -> tuple[Array, tuple]:
        return total + _block(spec, head_ve, *part)[0], ()

    count = _pieces(*labels_bt.shape, spec.vocab)
    parts = tuple(_cut(x, count) for x in (hidden_bte, labels_bt, weight_bt))
    return _over(make, jnp.zeros((), jnp.float32), parts)[0]


def _forward(
    spec: DecoderSpec, head_ve: Array, hidden_bte: Array, labels_bt: Array, weight_bt: Array
) -> tuple[Array, tuple[Array, Array]]:
    def make(total: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        states, labels, weight = part
        loss, logits, normaliser = _block(spec, head_ve, states, labels, weight)
        slope = jnp.exp(logits - normaliser[..., None])
        hit = labels[..., None] == jnp.arange(spec.vocab)
        slope = ((slope - hit) * weight[..., None] * _slope(spec, logits)).astype(states.dtype)
        d_head = einsum("rv,re->ve", slope, states).astype(jnp.float32)
        d_states = einsum("rv,ve->re", slope, head_ve.astype(states.dtype))
        return (total[0] + loss, total[1] + d_head), d_states

    count = _pieces(*labels_bt.shape, spec.vocab)
    parts = tuple(_cut(x, count) for x in (hidden_bte, labels_bt, weight_bt))
    initial = (jnp.zeros((), jnp.float32), jnp.zeros(head_ve.shape, jnp.float32))
    (loss, d_head), d_hidden = _over(make, initial, parts)
    batch, tokens, width = hidden_bte.shape
    d_hidden = jnp.moveaxis(d_hidden.reshape(count, batch, -1, width), 0, 1).reshape(batch, -1, width)[:, :tokens]
    return loss, (d_head.astype(head_ve.dtype), d_hidden.astype(hidden_bte.dtype))


def _backward(_spec: DecoderSpec, held: tuple[Array, Array], slope: Array) -> tuple[Array, Array, None, None]:
    d_head, d_hidden = held
    return d_head * slope.astype(d_head.dtype), d_hidden * slope.astype(d_hidden.dtype), None, None


summed_nll.defvjp(_forward, _backward)
