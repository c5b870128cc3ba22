"""The smallest parts of the blocks: activation functions, linear maps, norms. Weights are `[out, in]`, y = W x + b."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
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


class Norm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) or layer norm (Ba et al. 2016) of the last axis, in float32."""

    def __init__(
        self, shape: tuple[int, ...], spec: DecoderSpec, *, bias: bool | None = None, eps: float | None = None
    ) -> None:
        self.kind, self.eps, self.offset = spec.norm, spec.norm_eps if eps is None else eps, spec.norm_offset
        self.weight = nnx.Param(jnp.zeros(shape) if self.offset else jnp.ones(shape))
        if spec.norm_bias if bias is None else bias:
            self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: Array) -> Array:
        """Normalises the last axis; a weight of two axes holds one per head, which is the last axis but one of x."""
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.kind == "rms" and not self.offset:
            return self.weight[...].astype(x.dtype) * wide.astype(x.dtype)
        wide = wide * (self.weight[...].astype(jnp.float32) + float(self.offset))
        return (wide + self.bias[...].astype(jnp.float32) if hasattr(self, "bias") else wide).astype(x.dtype)
