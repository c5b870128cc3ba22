"""Sums over positions of which ridge regressions toward prediction targets are made, added up batch by batch.

On a mesh everything that is as large as weights stays split: sums for a projection lie like its parameter, Grams are
split over both axes, and the read-out's vocabulary is split over all devices while its logits are made (Megatron-LM,
Narayanan et al. 2021). Only states of tokens are sent between devices, never logits or sums.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tmjax import backend
from tmjax.activations.joined import Joined, run_joined
from tmjax.models.blocks.primitives import einsum, precision
from tmjax.models.decoder import ForwardPlan, bind, scaled_logits
from tmjax.sharding.mesh import ACTIVATION_RULES
from tmjax.transfer.least_squares.ridge_systems import DEVICES
from tmjax.transfer.least_squares.sum_program import SumProgram, Sums
from tmjax.typing import Array, Params

#: Entries (token x vocabulary) of the logits that a device makes at a time: of an accelerator, of a CPU, whose caches
#: hold about that many; and the smallest number of tokens.
LOGIT_ENTRIES, CPU_ENTRIES, LEAST_TOKENS = 2**26, 2**20, 512
#: Tokens of a batch on every accelerator: enough for its products to take longer than fetching the weights.
DEVICE_TOKENS = 1024


def batch_tokens(vocab: int, max_tokens: int, devices: int = 1) -> int:
    """Returns the tokens of a batch for a job of so many devices.

    At most `max_tokens` on a CPU, unless that is too few to read the unembedding for; an accelerator takes more.
    """
    if backend.platform() == "cpu":
        return max(LEAST_TOKENS, min(max_tokens, LOGIT_ENTRIES // vocab))
    return max(max_tokens, DEVICE_TOKENS * devices)


def logits_at_once(vocab: int, tokens: int, devices: int = 1) -> int:
    """Returns the number of tokens, of a batch of `tokens`, whose logits are made at the same time."""
    entries = CPU_ENTRIES if backend.platform() == "cpu" else LOGIT_ENTRIES * devices
    return min(tokens, max(LEAST_TOKENS, entries // vocab))


def _summed(equation: str, *operands: Array) -> Array:
    """`jnp.einsum` of two arrays in the wider of their dtypes, summed in float32."""
    dtype = jnp.result_type(*operands)
    operands = tuple(x.astype(dtype) for x in operands)
    return jnp.einsum(equation, *operands, precision=precision(dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("program", "own"), donate_argnames="total")
def added(
    program: SumProgram, total: Sums, params: Params, texts: Joined, token: Array, weight: Array, own: bool
) -> Sums:
    """Adds one batch to the sums.

    Args:
        program: What is solved, and where it lies.
        total: Sums so far; donated.
        params: Parameters of the target.
        texts: Texts joined in rows [B, T].
        token: Token ids [B, T, K] of the teacher.
        weight: Their probabilities [B, T, K].
        own: Whether the texts' own next tokens are targets too.

    Returns:
        The sums with this batch.
    """
    spec, first = program.spec, 1 - own
    real = (texts.text >= 0).astype(jnp.float32)
    sites = ("resid", *program.inputs)
    captured = run_joined(bind(spec, params), texts, ForwardPlan(program.dtype, sites, mesh=program.mesh)).captured
    last = captured.pop("resid")[-1]
    cross, curvature, asked, states = _readout(program, params, last, (texts.label, real, token, weight), own)
    hidden = program.place(states * real[..., None].astype(states.dtype), None, None, None)
    rows, columns = program.gram_axes(spec.hidden)
    gram = _summed("bte,btf->ef", program.place(hidden, None, None, rows), program.place(hidden, None, None, columns))
    inner, grams = _projections(program, total, captured, real, asked)
    count = jnp.stack([own * jnp.sum(real), jnp.sum(weight), jnp.sum(real)])
    sums = Sums(
        total.cross.at[first:].add(cross),
        total.gram + gram,
        total.curvature + curvature,
        inner,
        grams,
        total.count + count,
    )
    if program.mesh is None:
        return sums
    return jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, s.sharding), sums, program.shapes_of_sums())


def _projections(
    program: SumProgram, total: Sums, captured: dict[str, Array], real: Array, asked: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Adds the sums of the projections.

    Takes the inputs [L, B, T, in] of every site, which tokens are real [B, T], and the changes [B, T, kinds, embed]
    that are asked for. Every device gathers the tokens' inputs of a layer, once, and makes its own part of the sums.
    """
    mesh, first = program.mesh, 2 - asked.shape[2]
    batch = ACTIVATION_RULES["batch"]
    written = tuple(asked for _ in program.writers)

    def rows_of(x: Array, size: int) -> Array:
        """The rows of a site's Gram matrix that are this device's, as columns of its inputs [B, T, in]."""
        axes, columns = program.gram_axes(size)
        if columns is not None:
            x = jax.lax.all_gather(x, columns, axis=2, tiled=True)
        if axes is None:
            return x
        own = size // math.prod(mesh.shape[axis] for axis in axes)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * own, own, axis=2)

    def summed(
        inner: dict[str, Array],
        grams: dict[str, Array],
        captured: dict[str, Array],
        real: Array,
        written: tuple[Array, ...],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        def layer(number: Array, sums: tuple[dict[str, Array], dict[str, Array]]) -> tuple[dict, dict]:
            inner, grams = (dict(part) for part in sums)
            for site, size in program.inputs.items():
                x = captured[site][number] * real[..., None].astype(captured[site].dtype)
                if mesh is not None:
                    x = jax.lax.all_gather(x, batch, axis=0, tiled=True)
                grams[site] = grams[site].at[number].add(_summed("bti,btj->ij", rows_of(x, size), x))
                for (path, own_site), asked in zip(program.writers, written, strict=True):
                    if own_site == site:
                        inner[path] = inner[path].at[first:, number].add(_summed("btso,bti->soi", asked, x))
            return inner, grams

        return jax.lax.fori_loop(0, program.spec.layers, layer, (inner, grams))

    arrays = total.inner, total.grams, captured, real, written
    if mesh is None:
        return summed(*arrays)
    shapes = program.shapes_of_sums()
    sums = tuple(jax.tree.map(lambda x: x.sharding.spec, part) for part in (shapes.inner, shapes.grams))
    sites = {site: PartitionSpec(None, batch, None, "tensor") for site in captured}
    outputs = tuple(
        PartitionSpec(None, None, None, program.writer_axes(number)[0]) for number in range(len(program.writers))
    )
    specs = *sums, sites, PartitionSpec(batch), outputs
    return jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=sums, check_vma=False)(*arrays)


def _readout(
    program: SumProgram, params: Params, last: Array, targets: tuple[Array, ...], own: bool
) -> tuple[Array, Array, Array, Array]:
    """Sums of the read-out, and what it asks of the last residual stream [B, T, embed].

    Returns the cross products [kinds, V, embed] of residuals and states, sums of p (1 - p) [V], changes
    [B, T, kinds, embed] of the stream, and normed states [B, T, embed].
    """
    spec, place = program.spec, program.place
    batch = ACTIVATION_RULES["batch"]
    rows, tokens, _ = last.shape
    # Parts of the token axis, not of the batch: the batch is what a mesh splits.
    count = -(-tokens // max(1, logits_at_once(spec.vocab, rows * tokens, program.devices) // rows))
    size = -(-tokens // count)
    # Split over the vocabulary, once a batch; in two steps, as XLA would go through a whole copy from one to the other.
    weights = jnp.asarray(params[program.readout], last.dtype)
    weights = place(jnp.pad(weights, ((0, program.vocab - spec.vocab), (0, 0))), ("tensor", "fsdp"), None)
    weights = place(weights, DEVICES, None)
    bias = None
    if spec.head_bias:
        bias = place(jnp.pad(jnp.asarray(params["head.bias"]), (0, program.vocab - spec.vocab)), DEVICES)
    padded = jnp.arange(program.vocab) >= spec.vocab

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - tokens), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    def whole(x: Array) -> Array:
        """[pieces, B, size, ...] as [B, T, ...]."""
        return jnp.moveaxis(x, 0, 1).reshape(rows, count * size, *x.shape[3:])[:, :tokens]

    def normed(stream: Array) -> Array:
        return bind(spec, params).norm(stream)

    def piece(total: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        stream, *others = part
        label, real, token, weight = (place(x) for x in others)
        own_states, norm_back = jax.vjp(normed, stream)
        states = place(own_states, None, None, None)
        products = place(einsum("bte,ve->btv", states, weights), None, None, DEVICES)
        scores, scale_back = jax.vjp(functools.partial(scaled_logits, spec, bias=bias), products)
        if program.vocab != spec.vocab:
            scores = jnp.where(padded, -jnp.inf, scores)
        p = jax.nn.softmax(scores)
        row, position = jnp.ogrid[: p.shape[0], : p.shape[1]]
        mass = jnp.sum(weight, axis=-1)
        # Residuals of the logits, the negative gradient of the loss: q - p, weighted by the mass of the target.
        residuals = [(-mass[..., None] * p).at[row[..., None], position[..., None], token].add(weight)]
        if own:
            residuals.insert(0, (-real[..., None] * p).at[row, position, jnp.maximum(label, 0)].add(real))
        cross, asked = [], []
        for residual in residuals:
            (back,) = scale_back(place(residual, None, None, DEVICES))
            cross.append(_summed("btv,bte->ve", back, states))
            stream_back = place(einsum("btv,ve->bte", back, weights), batch, None, None)
            asked.append(norm_back(stream_back.astype(own_states.dtype))[0])
        curved = jnp.sum(real[..., None] * p * (1 - p), axis=(0, 1))
        total = place(total[0] + jnp.stack(cross), None, DEVICES, None), place(total[1] + curved, DEVICES)
        return total, (jnp.stack(asked, axis=2), own_states)

    start = jnp.zeros((1 + own, program.vocab, spec.hidden)), jnp.zeros(program.vocab)
    (cross, curvature), pieces = jax.lax.scan(piece, start, tuple(map(cut, (last, *map(jnp.asarray, targets)))))
    asked, states = map(whole, pieces)
    return cross, curvature, asked, states


@functools.partial(jax.jit, donate_argnames="sums")
def means(sums: Sums) -> Sums:
    """Divides sums by their counts: those over targets by the positions of each kind, the others by all positions."""
    seen = sums.count[2]
    each = jnp.maximum(sums.count[:2], 1e-30)

    def both(x: Array) -> Array:
        return x / each.reshape(2, *[1] * (x.ndim - 1))

    return Sums(
        both(sums.cross),
        sums.gram / seen,
        sums.curvature / seen,
        {path: both(x) for path, x in sums.inner.items()},
        {site: x / seen for site, x in sums.grams.items()},
        sums.count,
    )
