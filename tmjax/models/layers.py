"""The blocks of the decoder: attention and MLP."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from tmjax.models.alibi import alibi_bias
from tmjax.models.blocks.latent_attention import LatentProjections
from tmjax.models.blocks.primitives import ACTIVATIONS, Linear, Norm, einsum
from tmjax.models.rotary import rotate
from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array

#: Receives the activations of a site and returns those with which the block continues.
Record: TypeAlias = Callable[[str, Array], Array]
#: Maps the input [B, T, embed] of an MLP to its output, and records the sites inside.
Feed: TypeAlias = Callable[[Array, Record], Array]


class Sight(NamedTuple):
    """Which keys each query attends to, and how far before it they stand.

    Attributes:
        mask: Whether a query sees a key, [Q, T], or [B, 1, 1, Q, T] for each text.
        distance: The query's position less the key's, of the mask's shape; read only where a key is seen.
        position: The queries' positions, of the mask's shape without its last axis.
    """

    mask: Array
    distance: Array
    position: Array

    @classmethod
    def within(cls, window: Array, distance: Array, position: Array) -> "Sight":
        """Of the keys from the query itself back through a window."""
        return cls((distance >= 0) & (distance < window), distance, position)


class Weighing(NamedTuple):
    """How a layer turns products of queries and keys into weights.

    Attributes:
        scale: Factor of the products.
        spec: The architecture: its cap of scores and its linear biases (ALiBi).
        sinks_h: Logits of the sinks [H], which take their share of the weights away; None: no sinks.
    """

    scale: Array | float
    spec: DecoderSpec
    sinks_h: Array | None = None

    def weights(self, products_bkgts: Array, sight: Sight, masked: float = -jnp.inf) -> Array:
        """Attention weights [B, K, G, Q, T], float32, of the products of each query and key; `masked` are unseen."""
        spec, (kv_heads, each) = self.spec, products_bkgts.shape[1:3]
        scores = products_bkgts.astype(jnp.float32) * self.scale
        if spec.attention_cap is not None:
            scores = spec.attention_cap * jnp.tanh(scores / spec.attention_cap)
        if spec.alibi is not None:
            scores = scores + alibi_bias(spec.alibi, (kv_heads, each), sight.distance, sight.position)
        scores = jnp.where(sight.mask, scores, masked)
        if self.sinks_h is None:
            return jax.nn.softmax(scores, axis=-1)
        sinks = jnp.reshape(self.sinks_h.astype(jnp.float32), (kv_heads, each, 1, 1))
        sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
        return jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]


def attention(q_bthd: Array, k_btkd: Array, v_btkd: Array, sight: Sight, weighing: Weighing) -> Array:
    """Grouped-query attention, softmax in float32; query head h reads key-value head h // (H / K).

    There may be fewer queries than keys, [B, Q, H, head_dim].
    """
    batch, tokens, heads, dim = q_bthd.shape
    kv_heads = k_btkd.shape[2]
    grouped = q_bthd.reshape(batch, tokens, kv_heads, heads // kv_heads, dim)
    weights = weighing.weights(einsum("btkgd,bskd->bkgts", grouped, k_btkd), sight).astype(q_bthd.dtype)
    return einsum("bkgts,bskd->btkgd", weights, v_btkd).reshape(batch, tokens, heads * dim)


#: Signature of `attention`; packed texts and caches bring their own, which knows the positions of each text's tokens.
#: What it gets as the sight is what the context's `mask` made of the layer's window.
Attend: TypeAlias = Callable[[Array, Array, Array, Any, Weighing], Array]


class LayerPlace(NamedTuple):
    """Inputs of a block that depend on its place: cosines, sines [(B,) T, planes], sight, scale of scores."""

    tables: tuple[Array, Array]
    sight: Any
    scale: Array
    attend: Attend = attention


class Mlp(nnx.Module):
    """The gated or plain MLP of a block."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs) -> None:
        self.spec, embed, mlp = spec, spec.axis_size("embed"), spec.axis_size("mlp")
        if spec.gated:
            self.gate = Linear(embed, mlp, bias=spec.mlp_bias, rngs=rngs)
        self.up = Linear(embed, mlp, bias=spec.mlp_bias, rngs=rngs)
        self.down = Linear(mlp, embed, bias=spec.mlp_bias, rngs=rngs)

    def feed(self, h: Array, record: Record) -> Array:
        """Maps the input [B, T, embed] of the MLP to its output."""
        activation = ACTIVATIONS[self.spec.activation]
        gate = record("gate", self.gate(h)) if self.spec.gated else None
        up = record("up", self.up(h))
        return self.down(record("mlp_hidden", activation(up) if gate is None else activation(gate) * up))


class Block(Mlp):
    """One decoder block; `record(site, x)` sees the activations [B, T, unit] of every site as they arise.

    The blocks of a mixture of experts hold no MLP: each is called with the `feed` of its layer.
    """

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs) -> None:
        embed, heads, kv = (spec.axis_size(axis) for axis in ("embed", "heads", "kv_heads"))
        self.spec = spec
        if spec.pre_norm:
            self.attn_norm = Norm((embed,), spec)
            if not spec.shared_norm:
                self.mlp_norm = Norm((embed,), spec)
        if spec.post_norm:
            self.attn_post_norm = Norm((embed,), spec)
            self.mlp_post_norm = Norm((embed,), spec)
        if spec.latent is not None:
            self.latent = LatentProjections(spec, rngs=rngs)
        else:
            self.q = Linear(embed, heads, bias=spec.qkv_bias, rngs=rngs)
            self.k = Linear(embed, kv, bias=spec.qkv_bias, rngs=rngs)
            self.v = Linear(embed, kv, bias=spec.qkv_bias, rngs=rngs)
        if spec.qk_norm != "none":
            shapes = {
                "head": ((spec.head_dim,),) * 2,
                "heads": ((spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim)),
                "full": ((heads,), (kv,)),
            }[spec.qk_norm]
            self.q_norm, self.k_norm = (Norm(shape, spec, bias=False) for shape in shapes)
        if spec.sinks:
            self.sinks = nnx.Param(jnp.zeros((spec.heads,)))
        self.o = Linear(heads if spec.latent is None else spec.axis_size("values"), embed, bias=spec.o_bias, rngs=rngs)
        if spec.experts is None:
            super().__init__(spec, rngs=rngs)

    def _heads(self, h: Array, record: Record) -> tuple[Array, Array, Array]:
        """Queries, keys and values [B, T, head, head_dim] before the rotary embedding."""
        spec = self.spec
        q, k, v = (record(site, getattr(self, site)(h)) for site in ("q", "k", "v"))
        if spec.qkv_clip is not None:
            q, k, v = (jnp.clip(y, -spec.qkv_clip, spec.qkv_clip) for y in (q, k, v))
        if spec.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:2], -1, spec.head_dim) for y in (q, k, v))
        return (self.q_norm(q), self.k_norm(k), v) if spec.qk_norm in ("head", "heads") else (q, k, v)

    def _attention(self, h: Array, place: LayerPlace, record: Record) -> Array:
        spec = self.spec
        q, k, v = self._heads(h, record) if spec.latent is None else self.latent(h)
        q, k = (rotate(y, place.tables, interleaved=spec.rotary.interleaved) for y in (q, k))
        weighing = Weighing(place.scale, spec, self.sinks[...] if spec.sinks else None)
        mix = place.attend(q, k, v, place.sight, weighing)
        mix = record("attn_mix", mix) if spec.latent is None else self.latent.values_of(mix)
        out = record("attn_out", self.o(mix))
        return self.attn_post_norm(out) if spec.post_norm else out

    def __call__(self, x_bte: Array, place: LayerPlace, record: Record, feed: Feed | None = None) -> Array:
        """The residual stream after the block. `record` returns what the block goes on with."""
        spec, feed = self.spec, self.feed if feed is None else feed

        def add(x: Array, *branches: Array) -> Array:
            for branch in branches:
                x = x + (branch if spec.residual_scale == 1 else branch * spec.residual_scale)
            return x

        h = record("attn_in", self.attn_norm(x_bte) if spec.pre_norm else x_bte)
        attended = self._attention(h, place, record)
        between = x_bte if spec.parallel else add(x_bte, attended)
        if not spec.shared_norm:
            h = self.mlp_norm(between) if spec.pre_norm else between
        mlp = record("mlp_out", feed(record("mlp_in", h), record))
        mlp = self.mlp_post_norm(mlp) if spec.post_norm else mlp
        return record("resid", add(x_bte, attended, mlp) if spec.parallel else add(between, mlp))
