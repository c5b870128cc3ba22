"""Architecture of a decoder (`DecoderSpec`), and place of a parameter in a Hugging Face checkpoint (`ParamSpec`)."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tmjax.errors import InputError
from tmjax.models.blocks.low_rank import Indexer, Latent
from tmjax.models.experts.mixture import Experts, layers_of
from tmjax.models.positions import Alibi, Rotary
from tmjax.models.sites import HEAD_SITES, INNER_SITES, SITES

#: Window of a layer that attends to everything before it.
FULL_ATTENTION = 10**9


@dataclass(frozen=True)
class DecoderSpec:
    """Everything the forward pass needs to know; hashable, so it is a static argument of every jitted function.

    `norm` is root-mean-square or layer norm, with `norm_bias`, its weight stored less 1 if `norm_offset`; a block norms
    what a branch reads (`pre_norm`), what it writes (`post_norm`), or both. `parallel`: attention and MLP read the same
    stream, through one norm if `shared_norm`. `qk_norm` norms queries and keys: `head` with one weight [head_dim] for
    all heads, `heads` with a weight per head, `full` over all heads together. `gated`: the MLP has a gate.
    Queries, keys and values are cut at +-`qkv_clip`. With `sinks` every head has a logit that takes part in the softmax
    and carries no value. `alibi` biases scores by distance. `embedding_norm` norms what the first block reads.
    `head_bias`: the logits have a bias.
    `attention_scale` None is head_dim ** -0.5, divided by the layer's number from 1 on if `inverse_layer_scale`;
    `attention_cap` and `logit_cap` bound scores and logits by cap tanh(x / cap). `learned_positions` or
    `sinusoidal_positions` are added to the embeddings, from row `position_offset` of their table on. `layer_rotary`
    gives every layer the number of its rotary embedding: 0 is `rotary`, 1 `local_rotary`. With `experts` layers
    have a mixture of experts in place of the MLP, with `latent` keys and values have a low rank.
    """

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
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    windows: tuple[int, ...] = ()
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_offset: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    qk_norm: Literal["none", "head", "heads", "full"] = "none"
    gated: bool = True
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    inverse_layer_scale: bool = False
    attention_cap: float | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    learned_positions: bool = False
    position_offset: int = 0
    sinusoidal_positions: bool = False
    local_rotary: Rotary | None = None
    layer_rotary: tuple[int, ...] = ()
    experts: Experts | None = None
    alibi: Alibi | None = None
    sinks: bool = False
    head_bias: bool = False
    embedding_norm: bool = False
    qkv_clip: float | None = None
    latent: Latent | None = None

    def axis_size(self, axis: str) -> int:
        """Size of a logical axis: vocab, embed, heads, kv_heads or mlp (`heads` counts units, heads x head_dim).

        `head_count` and `kv_head_count` count heads, `head_dim` the units of one, `positions` the learned ones.
        Of a mixture `experts` and `routes` count experts, `expert_mlp` and `shared_mlp` units of one; `single` is 1.
        Of a latent attention `q_rank` and `kv_rank` are ranks, `kv_down` has the keys' rotary units beside the latter,
        `kv_up` keys without these and values, `values` values; of an indexer `index_heads` units, `index_dim` of one.
        """
        experts = self.experts or Experts(0, 0, 0)
        latent = self.latent or Latent(0, 0, self.head_dim)
        indexer = latent.indexer or Indexer(0, 0, 0, ())
        return {
            "vocab": self.vocab,
            "embed": self.hidden,
            "heads": self.heads * self.head_dim,
            "kv_heads": self.kv_heads * self.head_dim,
            "mlp": self.mlp,
            "head_count": self.heads,
            "kv_head_count": self.kv_heads,
            "head_dim": self.head_dim,
            "positions": self.max_positions + self.position_offset,
            "experts": experts.count,
            "routes": experts.count,
            "expert_mlp": experts.width,
            "shared_mlp": experts.shared_width,
            "single": 1,
            "q_rank": latent.q_rank,
            "kv_rank": latent.kv_rank,
            "kv_down": latent.kv_rank + latent.rotary_dim,
            "kv_up": self.heads * (self.head_dim - latent.rotary_dim + latent.value_dim),
            "values": self.heads * latent.value_dim,
            "index_heads": indexer.heads * indexer.dim,
            "index_dim": indexer.dim,
            "index_head_count": indexer.heads,
        }[axis]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that the model has: all but the gate of a plain MLP, units of experts, heads with latent keys."""
        missing = INNER_SITES if self.experts is not None else () if self.gated else ("gate",)
        missing += HEAD_SITES if self.latent is not None else ()
        return tuple(site for site in SITES if site not in missing)

    @property
    def score_scale(self) -> float:
        """Factor of the products of queries and keys, but for `inverse_layer_scale`."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        if self.latent is None or self.rotary.factor <= 1:
            return scale
        return scale * (0.1 * self.latent.mscale * math.log(self.rotary.factor) + 1.0) ** 2

    @property
    def bound(self) -> str | None:
        """Why no text of more than `max_positions` tokens can be read; None: any can."""
        if self.learned_positions:
            return f"the model learned {self.max_positions} positions"
        if self.latent is not None and self.latent.indexer is not None:
            return f"the model's sparse attention is read up to {self.max_positions} tokens, where it sees all"
        return None

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Attention window of every layer, in tokens."""
        return self.windows or (FULL_ATTENTION,) * self.layers

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The rotary embeddings that layers choose from."""
        return (self.rotary,) if self.local_rotary is None else (self.rotary, self.local_rotary)

    @property
    def layer_rotaries(self) -> tuple[int, ...]:
        """The number of every layer's rotary embedding."""
        return self.layer_rotary or (0,) * self.layers


@dataclass(frozen=True)
class Part:
    """Place of a parameter `[out, in]` or `[out]` in a tensor on disk that has it transposed, or has several.

    `start` is its first entry along `axis` in a tensor of `total` there (0: all are its own), where it has every
    `step`-th one. With `of` > 1 the rows come in `heads` groups of `of` blocks, of which `count` from number `index` on
    are the parameter's: q, k and v that alternate head by head have one each of three. `transposed`: the tensor is
    `[in, out]`, its last two axes exchanged. `row`: the parameter is the only row of the tensor, `[1, out]`.
    """

    start: int = 0
    total: int = 0
    heads: int = 0
    index: int = 0
    of: int = 1
    transposed: bool = False
    axis: int = 0
    row: bool = False
    step: int = 1
    count: int = 1

    def disk_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor on disk."""
        size = self.total or shape[self.axis] * self.of // self.count
        whole = (*([1] if self.row else []), *shape[: self.axis], size, *shape[self.axis + 1 :])
        return (*whole[:-2], *whole[-2:][::-1]) if self.transposed else whole

    def view(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The part of a tensor that is the parameter, as a view: to read from, or to write into.

        Its entries are those of the parameter in order; its shape has heads apart if they alternate.
        """
        rows = tensor[0] if self.row else tensor
        if self.transposed and rows.ndim > 1:
            rows = np.swapaxes(rows, -1, -2)
        if self.of > 1:
            blocks = rows.reshape(self.heads, self.of, -1, *shape[1:])
            return blocks[:, self.index : self.index + self.count]
        stop = self.start + shape[self.axis] * self.step
        return rows[(*[slice(None)] * self.axis, slice(self.start, stop, self.step))]


@dataclass(frozen=True)
class ParamSpec:
    """One row of a family's table: loading, export, sharding and transport all read it.

    `hf` is the tensor's name on disk, with `{layer}` where the layer number stands, and `{head}` or `{expert}` if every
    head or expert has a tensor of its own (the parameter's first axis); `path` the Flax path, stacked on a leading
    layer axis if `hf` has one. `layers` are those that have the parameter: all, or those without or with experts, or
    with an indexer. `axes` are the logical axes of one layer's tensor, `[out, in]` for projections. `role` says which
    projection (None for what is never transported), `input_site` and `output_site` which activations its columns and
    rows see. `tied_to` names the path a tied copy repeats, `part` where in the tensor the parameter lies.
    """

    hf: str
    path: str
    axes: tuple[str, ...]
    role: str | None = None
    input_site: str | None = None
    output_site: str | None = None
    tied_to: str | None = None
    part: Part | None = None
    layers: Literal["all", "dense", "sparse", "indexed"] = "all"

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{layer}" in self.hf

    @property
    def per_entry(self) -> bool:
        """Whether every head or expert has a tensor of its own."""
        return "{head}" in self.hf or "{expert}" in self.hf

    def layer_numbers(self, spec: DecoderSpec) -> tuple[int, ...]:
        """Numbers of the layers that have the parameter, in the order of its layer axis; (0,) if it is not stacked."""
        if self.layers == "indexed":
            return spec.latent.indexer.layers if spec.latent is not None and spec.latent.indexer is not None else ()
        return layers_of(self.layers, spec.layers, spec.experts) if self.stacked else (0,)

    def shape(self, spec: DecoderSpec) -> tuple[int, ...]:
        """Shape of one layer's parameter."""
        return tuple(spec.axis_size(axis) for axis in self.axes)

    def stacked_shape(self, spec: DecoderSpec) -> tuple[int, ...]:
        """Shape of the Flax parameter."""
        return (len(self.layer_numbers(spec)), *self.shape(spec)) if self.stacked else self.shape(spec)

    def disk_shape(self, spec: DecoderSpec) -> tuple[int, ...]:
        """Shape of the tensor on disk that the parameter lies in."""
        shape = self.shape(spec)[1:] if self.per_entry else self.shape(spec)
        return shape if self.part is None else self.part.disk_shape(shape)

    def layer_names(self, spec: DecoderSpec) -> list[list[str]]:
        """Names on disk, for every layer that has it (once if unstacked) one, or one per head or expert."""
        entries = range(self.shape(spec)[0]) if self.per_entry else (0,)
        layers = self.layer_numbers(spec)
        return [[self.hf.format(layer=layer, head=n, expert=n) for n in entries] for layer in layers]

    def names(self, spec: DecoderSpec) -> list[str]:
        """All names on disk, layer by layer."""
        return [name for layer in self.layer_names(spec) for name in layer]


def projections(rows: tuple[ParamSpec, ...]) -> Mapping[str, ParamSpec]:
    """The weight rows of all transported projections, by role."""
    return {row.role: row for row in rows if row.role is not None and len(row.axes) == 2}


def shared_projections(
    target_rows: tuple[ParamSpec, ...], source_rows: tuple[ParamSpec, ...], roles: Collection[str] | None = None
) -> dict[str, ParamSpec]:
    """The target's weight rows of the projections that both models have, by role; those of `roles` if given.

    A plain MLP has no `gate`. Raises InputError for a role asked for that one of them lacks.
    """
    target, source = projections(target_rows), projections(source_rows)
    for role in roles or ():
        if role not in target or role not in source:
            raise InputError(f"roles: {role} is not a projection of both models")
    return {role: row for role, row in target.items() if role in (roles or source)}


def biases(rows: tuple[ParamSpec, ...]) -> Mapping[str, ParamSpec]:
    """The bias rows of the projections that have one, by role."""
    return {row.role: row for row in rows if row.role is not None and len(row.axes) == 1}
