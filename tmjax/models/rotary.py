"""Rotary position embeddings (Su et al. 2021) and how long contexts rescale their frequencies."""

import math

import jax.numpy as jnp
import numpy as np

from tmjax.models.spec import Rotary
from tmjax.typing import Array


def _powers(theta: float, dims: int) -> np.ndarray:
    """theta^(2i / dims), rounded to float32 once, as PyTorch's are: a last digit off is 1e-4 after 1000 tokens."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return (theta ** exponents.astype(np.float64)).astype(np.float32)


def _yarn_ramp(rotary: Rotary, dims: int) -> np.ndarray:
    """0 for planes that turn more than `beta_fast` times over the original context, 1 below `beta_slow` times."""

    def plane(turns: float) -> float:
        return dims * math.log(rotary.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = plane(rotary.beta_fast), plane(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if high == low else high
    steps = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(steps, 0, 1).astype(np.float32)


def inverse_frequencies(rotary: Rotary, head_dim: int, tokens: int = 0) -> np.ndarray:
    """Radians per token of each rotary plane, float32, long-context scaling applied.

    `tokens` is the length of the run: `dynamic` and `longrope` change frequencies beyond `original_positions`.
    """
    dims = rotary.dims(head_dim)
    one = np.float32(1)
    if rotary.scaling == "none":
        return np.zeros(dims // 2, np.float32)
    if rotary.scaling == "dynamic":
        # Rounded to float32 where PyTorch rounds: all frequencies follow theta's last digit.
        length = np.float32(rotary.factor * max(tokens, rotary.original_positions))
        stretched = length / np.float32(rotary.original_positions) - np.float32(rotary.factor - 1)
        growth = np.float32(float(stretched) ** (dims / (dims - 2)))
        return one / _powers(float(np.float32(rotary.theta) * growth), dims)
    powers = _powers(rotary.theta, dims)
    base = one / powers
    if rotary.scaling == "linear":
        return base / np.float32(rotary.factor)
    if rotary.scaling == "llama3":
        # Turns of each plane over the original context, rounded where PyTorch rounds.
        turns = np.float32(rotary.original_positions) / (np.float32(2 * math.pi) / base)
        blend = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return ((1 - blend) * base / rotary.factor + blend * base).astype(np.float32)
    if rotary.scaling == "yarn":
        keep = one - _yarn_ramp(rotary, dims)
        return ((one / (np.float32(rotary.factor) * powers)) * (one - keep) + base * keep).astype(np.float32)
    if rotary.scaling == "longrope":
        factors = rotary.long_factors if tokens > rotary.original_positions else rotary.short_factors
        return one / (np.asarray(factors, np.float32) * powers)
    return base


def rotary_tables(rotaries: tuple[Rotary, ...], head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines [rotary, T, planes] of the angles at integer `positions` [T], which count from 0."""
    tokens = positions.shape[0]
    frequencies = np.stack([inverse_frequencies(rotary, head_dim, tokens) for rotary in rotaries])
    factors = np.asarray([rotary.attention_factor for rotary in rotaries], np.float32)[:, None, None]
    angles = positions.astype(jnp.float32)[None, :, None] * frequencies[:, None, :]
    return jnp.cos(angles) * factors, jnp.sin(angles) * factors


def rotate(x_bthd: Array, tables: tuple[Array, Array], *, interleaved: bool = False) -> Array:
    """Turns the planes of the first dimensions of `[B, T, H, head_dim]` by their angles [T, planes]; the rest stays.

    Angles [B, T, planes] are each text's own. Planes are (i, i + half), or neighbours if `interleaved`.
    """
    cos, sin = (table[..., None, :].astype(x_bthd.dtype) for table in tables)
    dims = 2 * cos.shape[-1]
    turning, rest = x_bthd[..., :dims], x_bthd[..., dims:]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    both = jnp.stack(turned, axis=-1).reshape(turning.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([both, rest], axis=-1) if rest.shape[-1] else both


def sinusoids(positions: Array, size: int) -> Array:
    """Sinusoidal embeddings [..., size] of positions: sines, then cosines, of `size` / 2 frequencies (fairseq's)."""
    half = size // 2
    frequencies = np.exp(-np.arange(half) * (np.log(10000.0) / (half - 1))).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(table, [(0, 0)] * positions.ndim + [(0, size % 2)])
