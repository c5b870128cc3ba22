"""The one decoder of all families: embedding, stacked blocks run by `jax.lax.scan`, final norm, head.

Parameters live in a flat mapping from dotted Flax path to array; `forward` and `logits` are pure functions over it.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tmjax.models.blocks.latent_attention import IndexerParams
from tmjax.models.blocks.primitives import INIT_STD, Norm, einsum
from tmjax.models.experts.expert_layer import Mixture
from tmjax.models.experts.mixture import Run, layers_of, runs_of
from tmjax.models.layers import Attend, Block, LayerPlace, Mlp, Sight, attention
from tmjax.models.rotary import rotary_tables, sinusoids
from tmjax.models.sites import SITES
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import constrain
from tmjax.typing import Array, ArrayLike, Params

#: Maps the activations [B, T, unit] of a recorded site to the array that is kept of them.
Collect = Callable[[Array], Array]
#: Arrays that a layer's attention hands on to the next layer's, beside the residual stream.
Carried = tuple[Array, ...]
#: Given the carried arrays and a layer's number: the layer's attention, and a function that returns the carried arrays
#: after the attention has run.
After = Callable[[], Carried]
Enter = Callable[[Carried, Array], tuple[Attend, After]]


def stateless(attend: Attend) -> Enter:
    """The same attention in every layer, with nothing carried."""
    return lambda carried, _layer: (attend, lambda: carried)


SELF_ATTENTION: Enter = stateless(attention)


def keep_all(x_btu: Array) -> Array:
    """Keeps the activations of a recorded site as they are."""
    return x_btu


@dataclass(frozen=True)
class ForwardPlan:
    """How a forward pass is computed and which activations it returns; hashable, nothing in it is traced.

    Attributes:
        dtype: Dtype of the residual stream and of all matrix products.
        sites: Sites whose activations are returned.
        collect: Applied to the activations [B, T, unit] of each of these sites in every layer.
        mesh: Mesh by whose axes the activations of all sites are laid out; None is one device.
        remat: Keep only the residual stream between blocks for a gradient, and compute the rest again.
        unroll: Blocks in one turn of the loop over layers: a longer program, fewer copies for a gradient.
    """

    dtype: jnp.dtype = jnp.float32
    sites: tuple[str, ...] = ()
    collect: Collect = keep_all
    mesh: Mesh | None = None
    remat: bool = False
    unroll: int = 1


@dataclass(frozen=True)
class TokenContext:
    """Where the tokens of a forward pass stand, and which of them each one attends to.

    Attributes:
        positions: Positions in their texts, [T] or [B, T].
        tables: Cosines and sines at these positions, [rotary, T, planes] or [rotary, B, T, planes].
        mask: Given a layer's window, the `Sight` that is handed to its attention.
        enter: The attention of every layer; the default is `attention`, which carries nothing.
        carried: Arrays handed to the first layer.
    """

    positions: Array
    tables: tuple[Array, Array]
    mask: Callable[[Array], Any]
    enter: Enter = SELF_ATTENTION
    carried: Carried = ()


class ForwardResult(NamedTuple):
    """Final normed states [B, T, embed], collected activations [layer, ...] by site, arrays after the last layer."""

    hidden: Array
    captured: dict[str, Array]
    carried: Carried


class Embedding(nnx.Module):
    """Token embedding table `[vocab, embed]`."""

    def __init__(self, vocab: int, size: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (vocab, size)))


class Head(nnx.Module):
    """The output head: a table [vocab, embed], unless it is the embeddings', and a bias [vocab] if there is one."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs) -> None:
        if not spec.tied_embeddings:
            self.weight = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (spec.vocab, spec.hidden)))
        if spec.head_bias:
            self.bias = nnx.Param(jnp.zeros((spec.vocab,)))


class Readout(NamedTuple):
    """What makes logits of normed states: the unembedding [vocab, embed], and the head's bias [vocab] if it has one."""

    table_ve: Array
    bias_v: Array | None = None


def _stacked(module: type[nnx.Module], spec: DecoderSpec, layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """A module of every layer, stacked on a leading layer axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs) -> nnx.Module:
        return module(spec, rngs=rngs)

    return stacked(rngs)


def _sliced(stack: nnx.State | tuple[Array, ...], start: int, stop: int) -> nnx.State | tuple[Array, ...]:
    """Layers `start` to `stop` of a stack; the stack itself if those are all."""
    return jax.tree.map(lambda x: x if stop - start == len(x) else x[start:stop], stack)


class Decoder(nnx.Module):
    """Decoder-only transformer driven by a `DecoderSpec`, its blocks stacked on a leading layer axis.

    In a mixture of experts the layers' expert layers and MLPs are stacks of their own beside the rest of the blocks.
    """

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs) -> None:
        self.spec = spec
        self.embed = Embedding(spec.vocab, spec.hidden, rngs=rngs)
        if spec.learned_positions:
            self.positions = Embedding(spec.axis_size("positions"), spec.hidden, rngs=rngs)
        if spec.embedding_norm:
            self.embed_norm = Norm((spec.hidden,), spec)
        self.blocks = _stacked(Block, spec, spec.layers, rngs)
        if spec.experts is not None:
            sparse, dense = (len(layers_of(kind, spec.layers, spec.experts)) for kind in ("sparse", "dense"))
            self.moe_blocks = _stacked(Mixture, spec, sparse, rngs)
            if dense:
                self.dense_blocks = _stacked(Mlp, spec, dense, rngs)
        if spec.latent is not None and spec.latent.indexer is not None:
            self.index_blocks = _stacked(IndexerParams, spec, len(spec.latent.indexer.layers), rngs)
        self.norm = Norm((spec.hidden,), spec)
        if spec.head_bias or not spec.tied_embeddings:
            self.head = Head(spec, rngs=rngs)

    def run(self, ids_bt: Array, plan: ForwardPlan | None = None, context: TokenContext | None = None) -> ForwardResult:
        """Runs the decoder over token ids, without its head.

        Args:
            ids_bt: Token ids [B, T].
            plan: Dtype, recorded sites and layout; None is float32 on one device, no site recorded.
            context: Positions and attention of the tokens. None: every row is one text from position 0 on, padded on
                the right.

        Returns:
            Final normed states [B, T, embed], the recorded activations and the carried arrays.
        """
        plan = ForwardPlan() if plan is None else plan
        context = self._texts(ids_bt.shape[1]) if context is None else context
        dtype, sites, mesh, tables = plan.dtype, plan.sites, plan.mesh, context.tables
        spec = self.spec
        scale = spec.score_scale
        number = jnp.arange(1, spec.layers + 1, dtype=jnp.float32)
        places = (
            jnp.asarray(spec.layer_windows, jnp.int32),
            jnp.asarray(spec.layer_rotaries, jnp.int32),
            scale / number if spec.inverse_layer_scale else jnp.full((spec.layers,), scale, jnp.float32),
            jnp.arange(spec.layers),
        )
        graph, state = nnx.split(self.blocks)
        feeds = {True: getattr(self, "moe_blocks", None), False: getattr(self, "dense_blocks", None)}
        feeds = {kind: None if stack is None else nnx.split(stack) for kind, stack in feeds.items()}

        def step(
            run: Run, stream: tuple[Array, Carried], layer: tuple[nnx.State, nnx.State | None, tuple[Array, ...]]
        ) -> tuple[tuple[Array, Carried], dict[str, Array]]:
            (x, carried), (state, inner, (window, kind, scale, number)) = stream, layer
            captured = {}

            def record(site: str, value: Array) -> Array:
                value = constrain(mesh, value, ("batch", None, SITES[site]))
                if site in sites:
                    captured[site] = plan.collect(value)
                return value

            attend, after = context.enter(carried, number)
            place = LayerPlace((tables[0][kind], tables[1][kind]), context.mask(window), scale, attend)
            feed = None
            if inner is not None:
                module = nnx.merge(feeds[run.sparse][0], inner)
                feed = functools.partial(module, mesh=mesh) if run.sparse else module.feed
            x = nnx.merge(graph, state)(x, place, record, feed)
            return (x, after()), captured

        x = self.embed.weight[...][ids_bt].astype(dtype)
        if spec.embedding_scale != 1:
            x = x * jnp.asarray(spec.embedding_scale, dtype)
        if spec.learned_positions:
            # Padding may reach beyond the last position; that no text does is checked where texts are read.
            row = jnp.minimum(context.positions, spec.max_positions - 1) + spec.position_offset
            x = x + self.positions.weight[...][row].astype(dtype)
        if spec.sinusoidal_positions:
            x = x + sinusoids(context.positions + spec.position_offset, spec.hidden).astype(dtype)
        if spec.embedding_norm:
            x = self.embed_norm(x)
        x = constrain(mesh, x, ("batch", None, SITES["resid"]))
        runs, made = runs_of(spec.layers, spec.experts), []
        carried = context.carried
        for run in runs:
            stack = feeds[run.sparse]
            inner = None if stack is None else _sliced(stack[1], run.first, run.first + run.stop - run.start)
            layers = (_sliced(state, run.start, run.stop), inner, _sliced(places, run.start, run.stop))
            body = functools.partial(step, run)
            # Inside a scan there is nothing that could undo the saving, so no barriers against it are needed.
            body = jax.checkpoint(body, prevent_cse=False) if plan.remat else body
            every = min(plan.unroll, run.stop - run.start)
            (x, carried), captured = jax.lax.scan(body, (x, carried), layers, unroll=every)
            made.append(captured)
        captured = made[0] if len(made) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *made)
        return ForwardResult(self.norm(x), captured, carried)

    def _texts(self, tokens: int) -> TokenContext:
        """Texts that begin with their row and attend to themselves."""
        position = jnp.arange(tokens)
        distance = position[:, None] - position[None, :]

        def mask(window: Array) -> Sight:
            return Sight.within(window, distance, position)

        return TokenContext(position, rotary_tables(self.spec.rotaries, self.spec.head_dim, position), mask)

    def logits(self, hidden: Array) -> Array:
        """Logits [..., vocab] of normed states, in float32."""
        table, bias = self.readout
        return scaled_logits(self.spec, einsum("...e,ve->...v", hidden, table.astype(hidden.dtype)), bias)

    def logits_of(self, hidden: Array, ids: Array) -> Array:
        """Logits [...] of one token `ids` [...] per state, in float32: `logits` without those of all others."""
        table, bias = jax.tree.map(lambda x: x[ids], self.readout)
        return scaled_logits(self.spec, einsum("...e,...e->...", hidden, table.astype(hidden.dtype)), bias)

    @property
    def readout(self) -> Readout:
        """The head's table, which may be the embeddings', and its bias."""
        table = self.embed.weight if self.spec.tied_embeddings else self.head.weight
        return Readout(table[...], self.head.bias[...] if self.spec.head_bias else None)


def known_logits(logits: Array, known_v: ArrayLike | None) -> Array:
    """Logits [..., vocab] without the rows of an embedding that are no tokens (not `known_v`): minus infinity there."""
    return logits if known_v is None else jnp.where(known_v, logits, -jnp.inf)


def scaled_logits(spec: DecoderSpec, products: Array, bias: Array | None = None) -> Array:
    """Products of states and unembedding as logits: float32, with the head's bias, scaled and capped as the model says.

    Args:
        spec: The architecture.
        products: The products, of any shape.
        bias: The head's bias of the same tokens, if the model has one; of a shape that spreads to that of the products.

    Returns:
        The logits.
    """
    logits = products.astype(jnp.float32)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    logits = logits if spec.logit_scale == 1 else logits * spec.logit_scale
    return logits if spec.logit_cap is None else spec.logit_cap * jnp.tanh(logits / spec.logit_cap)


@functools.lru_cache(maxsize=32)
def _skeleton(spec: DecoderSpec) -> tuple[nnx.GraphDef, tuple[tuple[tuple[str, ...], nnx.Variable], ...]]:
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0))))
    return graph, tuple(nnx.to_flat_state(state))


def parameter_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that the decoder has, by path."""
    return {".".join(map(str, path)): tuple(value.shape) for path, value in _skeleton(spec)[1]}


def bind(spec: DecoderSpec, params: Params) -> Decoder:
    """A `Decoder` that holds `params`; cheap, meant to be called inside jitted functions."""
    graph, flat = _skeleton(spec)
    return nnx.merge(
        graph, nnx.from_flat_state([(path, value.replace(params[".".join(map(str, path))])) for path, value in flat])
    )


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def forward(spec: DecoderSpec, params: Params, ids_bt: Array, dtype: jnp.dtype = jnp.float32) -> Array:
    """Logits [B, T, vocab] float32 of right-padded token ids, computed in `dtype`; positions count from 0."""
    model = bind(spec, params)
    return model.logits(model.run(ids_bt, ForwardPlan(dtype)).hidden)


def init_params(
    spec: DecoderSpec, key: Array, shardings: Mapping[str, jax.sharding.Sharding | None] | None = None
) -> dict[str, Array]:
    """Fresh random float32 parameters: matrices N(0, 0.02), norms one, biases zero; made where `shardings` say."""
    return _init_params(spec, key, tuple((shardings or {}).items()))


@functools.partial(jax.jit, static_argnames=("spec", "shardings"))
def _init_params(
    spec: DecoderSpec, key: Array, shardings: tuple[tuple[str, jax.sharding.Sharding | None], ...]
) -> dict[str, Array]:
    state = nnx.state(Decoder(spec, rngs=nnx.Rngs(params=key)))
    params = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(state)}
    placed = {path: sharding for path, sharding in shardings if sharding is not None}
    return params | {path: jax.lax.with_sharding_constraint(params[path], where) for path, where in placed.items()}
