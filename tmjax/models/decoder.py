"""The one decoder of all families: embedding, stacked blocks run by `jax.lax.scan`, final norm, head.

Parameters live in a flat mapping from dotted Flax path to array; `forward` and `logits` are pure functions over it.
"""

import functools
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tmjax.models.layers import INIT_STD, Attend, Block, LayerPlace, Linear, Norm, attention, einsum
from tmjax.models.rotary import rotary_tables
from tmjax.models.sites import SITES
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import constrain
from tmjax.typing import Array, ArrayLike, Params

#: What is done with the activations [B, T, unit] of a recorded site inside the scanned forward.
Collect = Callable[[Array], Array]
#: What layers hand on to each other beside the stream.
Carried = tuple[Array, ...]
#: Given what is carried and a layer's number: the layer's attention, and what it has made of the carried.
After = Callable[[], Carried]
Enter = Callable[[Carried, Array], tuple[Attend, After]]


def _stateless(attend: Attend) -> Enter:
    return lambda carried, _layer: (attend, lambda: carried)


class Embedding(nnx.Module):
    """Token embedding table `[vocab, embed]`."""

    def __init__(self, vocab: int, size: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (vocab, size)))


class Decoder(nnx.Module):
    """Decoder-only transformer driven by a `DecoderSpec`, its blocks stacked on a leading layer axis."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=spec.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(spec, rngs=rngs)

        self.spec = spec
        self.embed = Embedding(spec.vocab, spec.hidden, rngs=rngs)
        if spec.learned_positions:
            self.positions = Embedding(spec.max_positions, spec.hidden, rngs=rngs)
        self.blocks = stacked(rngs)
        self.norm = Norm((spec.hidden,), spec)
        if not spec.tied_embeddings:
            self.head = Linear(spec.hidden, spec.vocab, rngs=rngs)

    def hidden(
        self,
        ids_bt: Array,
        dtype: jnp.dtype,
        sites: Collection[str],
        collect: Collect,
        mesh: Mesh | None = None,
        *,
        remat: bool = False,
        unroll: int = 1,
    ) -> tuple[Array, dict[str, Array]]:
        """Final normed states [B, T, embed] and `collect`ed activations [layer, ...] of each named site.

        With a mesh, the activations of every site are laid out by the logical axis of its units. `remat`: a gradient
        keeps only the residual stream between blocks and computes what is in them again. `unroll` blocks make one turn
        of the loop over layers: a longer program, with fewer copies of what a gradient keeps.
        """
        position = jnp.arange(ids_bt.shape[1])
        distance = position[:, None] - position[None, :]
        tables = rotary_tables(self.spec.rotaries, self.spec.head_dim, position)

        def mask(window: Array) -> Array:
            return (distance >= 0) & (distance < window)

        return self.run(
            ids_bt, position, tables, mask, attention, dtype, sites, collect, mesh, remat=remat, unroll=unroll
        )

    def run(
        self,
        ids_bt: Array,
        position_t: Array,
        tables: tuple[Array, Array],
        mask: Callable[[Array], Array],
        attend: Attend,
        dtype: jnp.dtype,
        sites: Collection[str] = (),
        collect: Collect = lambda x: x,
        mesh: Mesh | None = None,
        *,
        remat: bool = False,
        unroll: int = 1,
    ) -> tuple[Array, dict[str, Array]]:
        """`hidden` of tokens at any positions [T]: `tables` [rotary, T, planes] are theirs.

        `attend` is `attention` or what takes its place; it is given `mask(window)` of every layer.
        """
        hidden, captured, _ = self.carry(
            (),
            ids_bt,
            position_t,
            tables,
            mask,
            _stateless(attend),
            dtype,
            sites,
            collect,
            mesh,
            remat=remat,
            unroll=unroll,
        )
        return hidden, captured

    def carry(
        self,
        carried: Carried,
        ids_bt: Array,
        position_t: Array,
        tables: tuple[Array, Array],
        mask: Callable[[Array], Array],
        enter: Enter,
        dtype: jnp.dtype,
        sites: Collection[str] = (),
        collect: Collect = lambda x: x,
        mesh: Mesh | None = None,
        *,
        remat: bool = False,
        unroll: int = 1,
    ) -> tuple[Array, dict[str, Array], Carried]:
        """`run` in which attention reads and changes `carried`, arrays that are handed from layer to layer.

        Positions may be [B, T] and `tables` [rotary, B, T, planes].
        """
        spec = self.spec
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        number = jnp.arange(1, spec.layers + 1, dtype=jnp.float32)
        places = (
            jnp.asarray(spec.layer_windows, jnp.int32),
            jnp.asarray(spec.layer_rotaries, jnp.int32),
            scale / number if spec.inverse_layer_scale else jnp.full((spec.layers,), scale, jnp.float32),
            jnp.arange(spec.layers),
        )
        graph, state = nnx.split(self.blocks)

        def step(
            stream: tuple[Array, Carried], layer: tuple[nnx.State, tuple[Array, ...]]
        ) -> tuple[tuple[Array, Carried], dict[str, Array]]:
            (x, carried), (state, (window, kind, scale, number)) = stream, layer
            captured = {}

            def record(site: str, value: Array) -> Array:
                value = constrain(mesh, value, ("batch", None, SITES[site]))
                if site in sites:
                    captured[site] = collect(value)
                return value

            attend, after = enter(carried, number)
            place = LayerPlace((tables[0][kind], tables[1][kind]), mask(window), scale, attend)
            x = nnx.merge(graph, state)(x, place, record)
            return (x, after()), captured

        x = self.embed.weight[...][ids_bt].astype(dtype)
        if spec.embedding_scale != 1:
            x = x * jnp.asarray(spec.embedding_scale, dtype)
        if spec.learned_positions:
            # Padding may reach beyond the last position; that no text does is checked where texts are read.
            x = x + self.positions.weight[...][jnp.minimum(position_t, spec.max_positions - 1)].astype(dtype)
        x = constrain(mesh, x, ("batch", None, SITES["resid"]))
        # Inside a scan there is nothing that could undo the saving, so no barriers against it are needed.
        body = jax.checkpoint(step, prevent_cse=False) if remat else step
        every = min(unroll, spec.layers)
        (x, carried), captured = jax.lax.scan(body, (x, carried), (state, places), unroll=every)
        return self.norm(x), captured, carried

    def logits(self, hidden: Array) -> Array:
        """Logits [..., vocab] of normed states, in float32."""
        return scaled_logits(self.spec, einsum("...e,ve->...v", hidden, self.unembedding.astype(hidden.dtype)))

    def logits_of(self, hidden: Array, ids: Array) -> Array:
        """Logits [...] of one token `ids` [...] per state, in float32: `logits` without those of all others."""
        return scaled_logits(self.spec, einsum("...e,...e->...", hidden, self.unembedding[ids].astype(hidden.dtype)))

    @property
    def unembedding(self) -> Array:
        """The head's table [vocab, embed], which may be the embeddings'."""
        return self.embed.weight[...] if self.spec.tied_embeddings else self.head.weight[...]


def known_logits(logits: Array, known_v: ArrayLike | None) -> Array:
    """Logits [..., vocab] without the rows of an embedding that are no tokens (not `known_v`): minus infinity there."""
    return logits if known_v is None else jnp.where(known_v, logits, -jnp.inf)


def scaled_logits(spec: DecoderSpec, logits: Array) -> Array:
    """Products of states and unembedding as logits: float32, scaled and capped as the model says."""
    logits = logits.astype(jnp.float32)
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
    hidden, _ = model.hidden(ids_bt, dtype, (), lambda x: x)
    return model.logits(hidden)


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
