"""Description of how positions enter attention: by turning queries and keys (`Rotary`) or by a bias (`Alibi`)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of the first `fraction` of every head: base frequency, rescaling for long contexts.

    `linear` divides every frequency by `factor`; `llama3` divides only those whose wavelength exceeds
    `original_positions / low_freq_factor` and blends down to `original_positions / high_freq_factor`; `dynamic` raises
    theta with the length of a run beyond `original_positions`; `yarn` blends between `beta_slow` and `beta_fast` turns
    over the original context (Peng et al. 2023); `longrope` divides each frequency by its own factor, the long ones for
    runs beyond `original_positions` (Ding et al. 2024); `none` turns nothing. Angles' cosines and sines are multiplied
    by `attention_factor`. `interleaved`: planes are neighbours (2i, 2i + 1), not (i, i + half).
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3", "dynamic", "yarn", "longrope", "none"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    fraction: float = 1.0
    interleaved: bool = False
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def dims(self, head_dim: int) -> int:
        """Returns the number of dimensions of a head that turn."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (Press et al. 2022): scores fall with the distance of query and key.

    Head h of n falls by 2^(-8 h / n) for a token, where n is a power of two; otherwise the heads beyond the largest
    power of two below n take every other slope of twice as many heads. Slopes are multiplied by `scale`. With `rounded`
    a bias is the difference of the slope's products with both positions, slopes and products in bfloat16 (Falcon).
    """

    scale: float = 1.0
    rounded: bool = False
