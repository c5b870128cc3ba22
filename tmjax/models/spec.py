"""What a decoder is (`DecoderSpec`) and where each parameter lies in a Hugging Face checkpoint (`ParamSpec`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

#: Window of a layer that attends to everything before it.
FULL_ATTENTION = 10**9


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding over the whole head: base frequency and how long contexts rescale it.

    `linear` divides every frequency by `factor`; `llama3` divides only those whose wavelength exceeds
    `original_positions / low_freq_factor` and blends down to `original_positions / high_freq_factor`.
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class DecoderSpec:
    """Everything the forward pass needs to know; hashable, so it is a static argument of every jitted function."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_positions: int
    norm_eps: float = 1e-6
    rotary: Rotary = field(default_factory=Rotary)
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    windows: tuple[int, ...] = ()

    def axis_size(self, axis: str) -> int:
        """Size of a logical axis: vocab, embed, heads, kv_heads or mlp (`heads` counts units, heads x head_dim)."""
        return {
            "vocab": self.vocab,
            "embed": self.hidden,
            "heads": self.heads * self.head_dim,
            "kv_heads": self.kv_heads * self.head_dim,
            "mlp": self.mlp,
        }[axis]

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Attention window of every layer, in tokens."""
        return self.windows or (FULL_ATTENTION,) * self.layers


@dataclass(frozen=True)
class ParamSpec:
    """One row of a family's table: loading, export, sharding and transport all read it.

    `hf` is the tensor's name on disk, with `{layer}` where the layer number stands; `path` the Flax path, stacked on a
    leading layer axis if `hf` has one. `axes` are the logical axes of one layer's tensor, `[out, in]` for projections.
    `role` says which projection (None for norms and embeddings, which are never transported), `input_site` and
    `output_site` which activations its columns and rows see. `tied_to` names the path a tied copy repeats.
    """

    hf: str
    path: str
    axes: tuple[str, ...]
    role: str | None = None
    input_site: str | None = None
    output_site: str | None = None
    tied_to: str | None = None

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{layer}" in self.hf

    def shape(self, spec: DecoderSpec) -> tuple[int, ...]:
        """Shape of one layer's tensor."""
        return tuple(spec.axis_size(axis) for axis in self.axes)

    def stacked_shape(self, spec: DecoderSpec) -> tuple[int, ...]:
        """Shape of the Flax parameter."""
        return (spec.layers, *self.shape(spec)) if self.stacked else self.shape(spec)

    def names(self, spec: DecoderSpec) -> list[str]:
        """Names on disk, one per layer (one in all for an unstacked parameter)."""
        return [self.hf.format(layer=layer) for layer in range(spec.layers)] if self.stacked else [self.hf]


def projections(rows: tuple[ParamSpec, ...]) -> Mapping[str, ParamSpec]:
    """The weight rows of all transported projections, by role."""
    return {row.role: row for row in rows if row.role is not None and len(row.axes) == 2}


def biases(rows: tuple[ParamSpec, ...]) -> Mapping[str, ParamSpec]:
    """The bias rows of the projections that have one, by role."""
    return {row.role: row for row in rows if row.role is not None and len(row.axes) == 1}
