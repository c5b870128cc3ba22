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
from jax.sharding import Mesh, PartitionSpec

from tmjax.models.blocks.primitives import einsum
from tmjax.models.decoder import Readout, scaled_logits
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import ACTIVATION_RULES
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


def _block(spec: DecoderSpec, head: Readout, part: _Part, *, slopes: bool) -> tuple[Array, Array, Array | None]:
    """Weighted losses of a block of tokens, of labels and of a teacher, and the slope of their sum in the logits.

    The teacher's loss is the divergence KL(q | p) over the k tokens and all others together: q is known no finer.
    """
    logits = scaled_logits(spec, einsum("re,ve->rv", part.states, head.table_ve), head.bias_v)
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


class _Sums(NamedTuple):
    """Sums of both losses over tokens, and their sum's slopes in the head (float32) and in hidden states."""

    text: Array
    divergence: Array
    d_head: Readout | None = None
    d_hidden: Array | None = None


def _summed(
    spec: DecoderSpec,
    head: Readout,
    hidden_bte: Array,
    labels_bt: Array,
    weight_bt: Array,
    teacher: TeacherTokens | None,
    *,
    slopes: bool,
) -> _Sums:
    """Sums over the tokens that are here, block by block; the head is whole and of the states' dtype."""

    def make(total: _Sums, part: _Part) -> tuple[_Sums, Array | None]:
        text, divergence, slope = _block(spec, head, part, slopes=slopes)
        total = total._replace(text=total.text + text, divergence=total.divergence + divergence)
        if slope is None:
            return total, None
        table, bias = total.d_head
        table = table + einsum("rv,re->ve", slope, part.states).astype(jnp.float32)
        bias = None if bias is None else bias + jnp.sum(slope.astype(jnp.float32), axis=0)
        return total._replace(d_head=Readout(table, bias)), einsum("rv,ve->re", slope, head.table_ve)

    count, parts = _parts(spec, hidden_bte, labels_bt, weight_bt, teacher)
    zero = jnp.zeros((), jnp.float32)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head) if slopes else None
    initial = _Sums(zero, zero, start)
    total, d_hidden = _over(make, initial, parts)
    if not slopes:
        return total
    batch, tokens, width = hidden_bte.shape
    d_hidden = jnp.moveaxis(d_hidden.reshape(count, batch, -1, width), 0, 1).reshape(batch, -1, width)[:, :tokens]
    return total._replace(d_hidden=d_hidden)


def _summed_on(
    mesh: Mesh | None,
    spec: DecoderSpec,
    head: Readout,
    hidden_bte: Array,
    labels_bt: Array,
    weight_bt: Array,
    teacher: TeacherTokens | None,
    *,
    slopes: bool,
) -> _Sums:
    """`_summed` over a mesh: the head is gathered once, and its slope summed over the devices once, after all blocks.

    Left to XLA, both would be done for every block. The axis `tensor`, which splits the vocabulary, stays XLA's.
    """
    compute = functools.partial(_summed, spec, slopes=slopes)
    head = jax.tree.map(lambda x: x.astype(hidden_bte.dtype), head)
    axes = () if mesh is None else tuple(axis for axis in ACTIVATION_RULES["batch"] if mesh.shape[axis] > 1)
    if not axes:
        return compute(head, hidden_bte, labels_bt, weight_bt, teacher)
    split = "fsdp" in axes and head.table_ve.shape[1] % mesh.shape["fsdp"] == 0
    copies = tuple(axis for axis in axes if not (split and axis == "fsdp"))

    def on_device(head: Readout, *batch: Array | TeacherTokens | None) -> _Sums:
        if split:
            head = head._replace(table_ve=jax.lax.all_gather(head.table_ve, "fsdp", axis=1, tiled=True))
        sums = compute(head, *batch)
        text, divergence = jax.lax.psum((sums.text, sums.divergence), axes)
        if not slopes:
            return _Sums(text, divergence)
        d_table, d_bias = sums.d_head
        if split:
            d_table = jax.lax.psum_scatter(d_table, "fsdp", scatter_dimension=1, tiled=True)
        if copies:
            d_table = jax.lax.psum(d_table, copies)
        d_bias = None if d_bias is None else jax.lax.psum(d_bias, axes)
        return _Sums(text, divergence, Readout(d_table, d_bias), sums.d_hidden)

    whole, rows, columns = PartitionSpec(), PartitionSpec(axes), PartitionSpec(None, "fsdp" if split else None)
    split_head = Readout(columns, None if head.bias_v is None else whole)
    placed = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(split_head, rows, rows, rows, rows),
        out_specs=_Sums(whole, whole, *((split_head, rows) if slopes else ())),
        axis_names=set(axes),
        check_vma=False,  # zeros begin the sums on every device alike
    )
    return placed(head, hidden_bte, labels_bt, weight_bt, teacher)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(
    spec: DecoderSpec,
    mesh: Mesh | None,
    head: Readout,
    hidden_bte: Array,
    labels_bt: Array,
    weight_bt: Array,
    teacher: TeacherTokens | None,
) -> tuple[Array, Array, Array]:
    sums = _summed_on(mesh, spec, head, hidden_bte, labels_bt, weight_bt, teacher, slopes=False)
    return sums.text + sums.divergence, sums.text, sums.divergence


def _forward(
    spec: DecoderSpec,
    mesh: Mesh | None,
    head: Readout,
    hidden_bte: Array,
    labels_bt: Array,
    weight_bt: Array,
    teacher: TeacherTokens | None,
) -> tuple[tuple[Array, Array, Array], tuple[Readout, Array]]:
    sums = _summed_on(mesh, spec, head, hidden_bte, labels_bt, weight_bt, teacher, slopes=True)
    slopes = jax.tree.map(lambda d, x: d.astype(x.dtype), (sums.d_head, sums.d_hidden), (head, hidden_bte))
    return (sums.text + sums.divergence, sums.text, sums.divergence), slopes


def _backward(
    _spec: DecoderSpec, _mesh: Mesh | None, stored: tuple[Readout, Array], slopes: tuple[Array, Array, Array]
) -> tuple[Readout, Array, None, None, None]:
    slope = slopes[0]
    d_head, d_hidden = jax.tree.map(lambda x: x * slope.astype(x.dtype), stored)
    return d_head, d_hidden, None, None, None


_losses.defvjp(_forward, _backward)


def summed_losses(
    spec: DecoderSpec,
    head: Readout,
    hidden_bte: Array,
    labels_bt: Array,
    weight_bt: Array,
    teacher: TeacherTokens | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, Array, Array]:
    """Sums weight x -ln p(label) and mask x KL(teacher | model) over the tokens of a batch.

    Differentiable in `head` and `hidden`; only the first result has a gradient.

    Args:
        spec: The architecture.
        head: The unembedding and the head's bias in their own dtype.
        hidden_bte: Normed states [B, T, embed].
        labels_bt: The next tokens [B, T].
        weight_bt: Weights of the first loss [B, T].
        teacher: Distributions of the next token; its mask may hold any weights.
        mesh: The device mesh that splits B.

    Returns:
        The sum of both losses, the first and the second; float32, nats.
    """
    return _losses(spec, mesh, head, hidden_bte, labels_bt, weight_bt, teacher)


def summed_nll(spec: DecoderSpec, head: Readout, hidden_bte: Array, labels_bt: Array, weight_bt: Array) -> Array:
    """`summed_losses` of labels alone."""
    return summed_losses(spec, head, hidden_bte, labels_bt, weight_bt)[0]
