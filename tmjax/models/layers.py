"""The blocks of the decoder: linear maps, norms, rotary attention, gated MLP. Weights are `[out, in]`, y = W x + b."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tmjax.models.spec import DecoderSpec, Rotary
from tmjax.typing import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
INIT_STD = 0.02


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Full float32 products for float32 data (accelerators would round to bfloat16), the default otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def einsum(equation: str, *operands: Array) -> Array:
    """`jnp.einsum` at the precision that the operands' dtype asks for."""
    return jnp.einsum(equation, *operands, precision=precision(operands[0].dtype))


class Linear(nnx.Module):
    """y = W x + b with W `[out, in]`, computed in the dtype of x."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = False, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (n_out, n_in)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((n_out,)))

    def __call__(self, x: Array) -> Array:
        """Maps `[..., in]` to `[..., out]`."""
        # Rows flattened: with two leading axes XLA's CPU backend copies transposes for the weight's gradient.
        y = einsum("ri,oi->ro", x.reshape(-1, x.shape[-1]), self.weight[...].astype(x.dtype))
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * wide.astype(x.dtype)


def inverse_frequencies(rotary: Rotary, head_dim: int) -> np.ndarray:
    """Radians per token of each rotary plane, `[head_dim / 2]` float32, long-context scaling applied.

    The power is rounded to float32 once, as PyTorch's is: a last digit off is an angle off by 1e-4 after 1000 tokens.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = np.float32(1) / (rotary.theta ** exponents.astype(np.float64)).astype(np.float32)
    if rotary.scaling == "default":
        return base
    if rotary.scaling == "linear":
        return base / np.float32(rotary.factor)
    turns = rotary.original_positions * base / (2 * math.pi)  # turns of each plane over the original context
    blend = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * base / rotary.factor + blend * base).astype(np.float32)


def rotary_tables(rotary: Rotary, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine `[T, head_dim]` of the rotary angles at integer `positions` [T]."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(rotary, head_dim)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_bthd: Array, tables: tuple[Array, Array]) -> Array:
    """Turns each plane (i, i + head_dim / 2) of `[B, T, H, head_dim]` by its angle."""
    cos, sin = (table[:, None, :].astype(x_bthd.dtype) for table in tables)
    first, second = jnp.split(x_bthd, 2, axis=-1)
    return x_bthd * cos + jnp.concatenate([-second, first], axis=-1) * sin


def attention(q_bthd: Array, k_btkd: Array, v_btkd: Array, mask_tt: Array) -> Array:
    """Grouped-query attention, softmax in float32; query head h reads key-value head h // (H / K)."""
    batch, tokens, heads, dim = q_bthd.shape
    kv_heads = k_btkd.shape[2]
    grouped = q_bthd.reshape(batch, tokens, kv_heads, heads // kv_heads, dim)
    scores = einsum("btkgd,bskd->bkgts", grouped, k_btkd).astype(jnp.float32) * (dim**-0.5)
    weights = jax.nn.softmax(jnp.where(mask_tt, scores, -jnp.inf), axis=-1).astype(q_bthd.dtype)
    return einsum("bkgts,bskd->btkgd", weights, v_btkd).reshape(batch, tokens, heads * dim)


class Block(nnx.Module):
    """One pre-norm decoder block; `record(site, x)` sees the activations [B, T, unit] of every site as they arise."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs) -> None:
        embed, heads, kv, mlp = (spec.axis_size(axis) for axis in ("embed", "heads", "kv_heads", "mlp"))
        self.spec = spec
        self.attn_norm = RMSNorm(embed, spec.norm_eps)
        self.q = Linear(embed, heads, bias=spec.qkv_bias, rngs=rngs)
        self.k = Linear(embed, kv, bias=spec.qkv_bias, rngs=rngs)
        self.v = Linear(embed, kv, bias=spec.qkv_bias, rngs=rngs)
        self.o = Linear(heads, embed, bias=spec.o_bias, rngs=rngs)
        self.mlp_norm = RMSNorm(embed, spec.norm_eps)
        self.gate = Linear(embed, mlp, bias=spec.mlp_bias, rngs=rngs)
        self.up = Linear(embed, mlp, bias=spec.mlp_bias, rngs=rngs)
        self.down = Linear(mlp, embed, bias=spec.mlp_bias, rngs=rngs)

    def __call__(
        self, x_bte: Array, tables: tuple[Array, Array], mask_tt: Array, record: Callable[[str, Array], Array]
    ) -> Array:
        """The residual stream after the block. `record` returns what the block goes on with."""
        h = record("attn_in", self.attn_norm(x_bte))
        q, k, v = (record(site, getattr(self, site)(h)) for site in ("q", "k", "v"))
        q, k, v = (y.reshape(*y.shape[:2], -1, self.spec.head_dim) for y in (q, k, v))
        mix = record("attn_mix", attention(rotate(q, tables), rotate(k, tables), v, mask_tt))
        x_bte = x_bte + record("attn_out", self.o(mix))
        h = record("mlp_in", self.mlp_norm(x_bte))
        gate, up = record("gate", self.gate(h)), record("up", self.up(h))
        hidden = record("mlp_hidden", ACTIVATIONS[self.spec.activation](gate) * up)
        return record("resid", x_bte + record("mlp_out", self.down(hidden)))
