"""Multi-head latent attention (DeepSeek-AI 2024): queries, keys and values out of a low rank."""

import jax.numpy as jnp
from flax import nnx

from tmjax.models.blocks.primitives import Linear, Norm
from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array

#: Epsilon of the norms of low ranks, which is not that of the blocks' norms.
EPS = 1e-6


class LatentProjections(nnx.Module):
    """Makes queries, keys and values of a layer. The units of a head that turn come first in it."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs) -> None:
        assert spec.latent is not None
        self.spec, self.latent = spec, spec.latent
        if spec.latent.q_rank:
            self.q_down = Linear(spec.hidden, spec.latent.q_rank, bias=spec.qkv_bias, rngs=rngs)
            self.q_norm = Norm((spec.latent.q_rank,), spec, eps=EPS)
        self.q_up = Linear(spec.latent.q_rank or spec.hidden, spec.axis_size("heads"), rngs=rngs)
        self.kv_down = Linear(spec.hidden, spec.axis_size("kv_down"), bias=spec.qkv_bias, rngs=rngs)
        self.kv_norm = Norm((spec.latent.kv_rank,), spec, eps=EPS)
        self.kv_up = Linear(spec.latent.kv_rank, spec.axis_size("kv_up"), rngs=rngs)

    def __call__(self, h_bte: Array) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values [B, T, head, head_dim] of normed inputs, values padded with zeros."""
        latent, heads = self.latent, (*h_bte.shape[:2], self.spec.heads, -1)
        still = self.spec.head_dim - latent.rotary_dim
        q = self.q_up(self.q_norm(self.q_down(h_bte)) if latent.q_rank else h_bte).reshape(heads)
        q = jnp.concatenate([q[..., still:], q[..., :still]], axis=-1)
        low = self.kv_down(h_bte)
        kv = self.kv_up(self.kv_norm(low[..., : latent.kv_rank])).reshape(heads)
        turning = jnp.broadcast_to(low[:, :, None, latent.kv_rank :], (*kv.shape[:3], latent.rotary_dim))
        k = jnp.concatenate([turning, kv[..., :still]], axis=-1)
        unused = self.spec.head_dim - latent.value_dim
        return q, k, jnp.pad(kv[..., still:], ((0, 0), (0, 0), (0, 0), (0, unused)))

    def values_of(self, mix: Array) -> Array:
        """Returns mixed values [B, T, head x value_dim] of mixed padded ones [B, T, head x head_dim]."""
        heads = mix.reshape(*mix.shape[:2], self.spec.heads, self.spec.head_dim)
        return heads[..., : self.latent.value_dim].reshape(*mix.shape[:2], -1)


class IndexerParams(nnx.Module):
    """Parameters of a layer's indexer: kept so that a checkpoint is complete, never used (`Indexer`)."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs) -> None:
        assert spec.latent is not None
        self.q_up = Linear(spec.latent.q_rank, spec.axis_size("index_heads"), rngs=rngs)
        self.k = Linear(spec.hidden, spec.axis_size("index_dim"), rngs=rngs)
        self.k_norm = Norm((spec.axis_size("index_dim"),), spec, bias=True)
        self.scale = Linear(spec.hidden, spec.axis_size("index_head_count"), rngs=rngs)
