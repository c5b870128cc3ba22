"""The expert layer: a router, experts of which every token passes through a few, and a shared one.

Tokens are sorted by expert, so that each expert's matrix meets its own rows alone (`grouped_product`). On a mesh every
device of the axis `tensor` has its part of the experts and takes the rows that chose them; the outputs are summed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from tmjax.models.blocks.primitives import ACTIVATIONS, INIT_STD, Linear, precision
from tmjax.models.experts.grouped import grouped_product
from tmjax.models.experts.mixture import Experts
from tmjax.models.layers import Record
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import ACTIVATION_RULES, RULES, constrain
from tmjax.typing import Array


class Choice(NamedTuple):
    """The experts of each row and their weights, [rows, chosen]."""

    ids: Array
    weights: Array


def choose(experts: Experts, logits_rn: Array, bias_n: Array | None) -> Choice:
    """Chooses experts for rows.

    Args:
        experts: The mixture.
        logits_rn: Logits of the router [rows, experts], float32.
        bias_n: Bias that is added to the scores for the choice alone.

    Returns:
        The chosen experts and the weights of their outputs, float32.
    """
    scores = jax.nn.softmax(logits_rn, axis=-1) if experts.router == "softmax" else jax.nn.sigmoid(logits_rn)
    ranked = scores if bias_n is None else scores + bias_n
    if experts.groups > 1:
        grouped = ranked.reshape(-1, experts.groups, experts.count // experts.groups)
        best = jnp.sum(jax.lax.top_k(grouped, experts.group_best)[0], axis=-1)
        kept = jax.lax.top_k(best, experts.chosen_groups)[1]
        is_open = jnp.any(kept[:, :, None] == jnp.arange(experts.groups), axis=1)
        ranked = jnp.where(is_open[:, :, None], grouped, -jnp.inf).reshape(ranked.shape)
    ids = jax.lax.top_k(ranked, experts.chosen)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if experts.normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Choice(ids, weights if experts.scale == 1 else weights * experts.scale)


class Projection(NamedTuple):
    """One projection of some experts: matrices [expert, out, in], and biases [expert, out] if it has some."""

    weight: Array
    bias: Array | None = None

    def __call__(self, x: Array, sizes: Array, number: Array) -> Array:
        """Maps rows [rows, in] sorted by expert, `sizes` rows each; `number` of each row, that of no expert last."""
        out = grouped_product(x, self.weight, sizes)
        if self.bias is None:
            return out
        return out + jnp.pad(self.bias, ((0, 1), (0, 0)))[number].astype(out.dtype)


class ExpertMatrices(nnx.Module):
    """Matrices [expert, out, in] of one projection of all experts, and their biases."""

    def __init__(self, count: int, n_in: int, n_out: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (count, n_out, n_in)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((count, n_out)))

    @property
    def projection(self) -> Projection:
        """The arrays."""
        return Projection(self.weight[...], self.bias[...] if hasattr(self, "bias") else None)


class Router(nnx.Module):
    """Logits of the experts, in float32, and the bias of the choice."""

    def __init__(self, spec: DecoderSpec, experts: Experts, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (experts.count, spec.hidden)))
        if experts.choice_bias:
            self.bias = nnx.Param(jnp.zeros((experts.count,)))
        if experts.logit_bias:
            self.logit_bias = nnx.Param(jnp.zeros((experts.count,)))

    def logits(self, x: Array) -> Array:
        """Logits [rows, experts] of rows [rows, embed]."""
        wide, weight = x.astype(jnp.float32), self.weight[...].astype(jnp.float32)
        logits = jnp.einsum("re,ne->rn", wide, weight, precision=precision(wide.dtype))
        return logits + self.logit_bias[...].astype(jnp.float32) if hasattr(self, "logit_bias") else logits


class Mixture(nnx.Module):
    """The experts of one layer."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs) -> None:
        assert spec.experts is not None
        self.spec, self.experts = spec, spec.experts
        count, embed, width, shared = spec.experts.count, spec.hidden, spec.experts.width, spec.experts.shared_width
        self.router = Router(spec, spec.experts, rngs=rngs)
        bias = spec.experts.bias
        self.gate = ExpertMatrices(count, embed, width, bias=bias, rngs=rngs)
        self.up = ExpertMatrices(count, embed, width, bias=bias, rngs=rngs)
        self.down = ExpertMatrices(count, width, embed, bias=bias, rngs=rngs)
        if shared:
            self.shared_gate = Linear(embed, shared, rngs=rngs)
            self.shared_up = Linear(embed, shared, rngs=rngs)
            self.shared_down = Linear(shared, embed, rngs=rngs)
        if spec.experts.shared_gate:
            self.shared_scale = Linear(embed, 1, rngs=rngs)

    def __call__(self, h_bte: Array, record: Record, mesh: Mesh | None = None) -> Array:
        """Maps the input [B, T, embed] of the layer to its output; the units of experts are no sites."""
        rows = h_bte.reshape(-1, h_bte.shape[-1])
        bias = self.router.bias[...].astype(jnp.float32) if self.experts.choice_bias else None
        choice = choose(self.experts, self.router.logits(rows), bias)
        projections = tuple(each.projection for each in (self.gate, self.up, self.down))
        out = self._routed(rows, choice, projections, mesh).reshape(h_bte.shape)
        return out + self._shared(h_bte, mesh) if self.experts.shared_width else out

    def _shared(self, h_bte: Array, mesh: Mesh | None) -> Array:
        activation = ACTIVATIONS[self.spec.activation]
        hidden = activation(self.shared_gate(h_bte)) * self.shared_up(h_bte)
        out = self.shared_down(constrain(mesh, hidden, ("batch", None, "mlp")))
        return out * jax.nn.sigmoid(self.shared_scale(h_bte)) if self.experts.shared_gate else out

    def _routed(self, rows: Array, choice: Choice, projections: tuple[Projection, ...], mesh: Mesh | None) -> Array:
        if mesh is None:
            return self._apply(rows, choice, projections, 0)
        axis = RULES["experts"]

        def on_device(rows: Array, choice: Choice, projections: tuple[Projection, ...]) -> Array:
            first = jax.lax.axis_index(axis) * len(projections[0].weight)
            return jax.lax.psum(self._apply(rows, choice, projections, first), axis)

        batch, parts = PartitionSpec(ACTIVATION_RULES["batch"]), PartitionSpec(axis)
        specs = batch, Choice(batch, batch), jax.tree.map(lambda _: parts, projections)
        placed = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)
        return placed(rows, choice, projections)

    def _apply(self, rows: Array, choice: Choice, projections: tuple[Projection, ...], first: Array | int) -> Array:
        """Outputs of the experts from number `first` on, of which those are here, weighed and summed per row."""
        gate, up, down = projections
        chosen, local = self.experts.chosen, len(gate.weight)
        number = choice.ids.reshape(-1) - first
        number = jnp.where((number >= 0) & (number < local), number, local)  # those of other devices come last
        order = jnp.argsort(number)
        sizes = jnp.bincount(number, length=local + 1)[:local].astype(jnp.int32)
        # Each row once for each of its experts; a permutation has a gradient without collisions.
        spread = jnp.broadcast_to(rows[:, None], (len(rows), chosen, rows.shape[1])).reshape(-1, rows.shape[1])
        x = spread.at[order].get(unique_indices=True)
        ordered = number[order]
        hidden = self._units(gate(x, sizes, ordered), up(x, sizes, ordered))
        out = down(hidden, sizes, ordered).astype(jnp.float32)
        out = out.at[jnp.argsort(order)].get(unique_indices=True).reshape(len(rows), chosen, -1)
        return jnp.sum(out * choice.weights[:, :, None], axis=1).astype(rows.dtype)

    def _units(self, gate: Array, up: Array) -> Array:
        """Units of experts from their gates and inputs."""
        limit = self.experts.limit
        if limit is None:
            return ACTIVATIONS[self.spec.activation](gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.experts.gain * gate)
