"""The tensor table that most families share: Llama's, with what the spec adds or leaves out."""

from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Field
from tmjax.models.spec import DecoderSpec, ParamSpec, Part

#: Config keys that most families spell alike; `fields` changes some.
_FIELDS = (
    Field("vocab_size", "vocab"),
    Field("hidden_size", "hidden"),
    Field("num_hidden_layers", "layers"),
    Field("num_attention_heads", "heads"),
    Field("num_key_value_heads", "kv_heads", lambda read: read["heads"]),
    Field("head_dim", "head_dim", lambda read: read["hidden"] // read["heads"]),
    Field("intermediate_size", "mlp"),
    Field("max_position_embeddings", "max_positions", 2048),
    Field("rms_norm_eps", "norm_eps", 1e-6, float),
    Field("tie_word_embeddings", "tied_embeddings", False, bool),
)
#: Ends of the names of a layer's fused expert tensors: gates with inputs, outputs; names of those of one expert.
FUSED_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
SINGLE_EXPERT = ("gate_proj", "up_proj", "down_proj")


def fields(*changed: Field, without: tuple[str, ...] = ()) -> tuple[Field, ...]:
    """The shared fields, those for the same attribute replaced by `changed`, some left out."""
    own = {field.attribute: field for field in changed}
    kept = [own.pop(field.attribute, field) for field in _FIELDS if field.attribute not in without]
    return (*kept, *own.values())


def norm(hf: str, path: str, spec: DecoderSpec, axes: tuple[str, ...] = ("embed",)) -> tuple[ParamSpec, ...]:
    """Rows of a norm: its weight and, if the spec's norms have one, its bias."""
    weight = ParamSpec(f"{hf}.weight", f"{path}.weight", axes)
    return (weight, ParamSpec(f"{hf}.bias", f"{path}.bias", axes)) if spec.norm_bias else (weight,)


_ENDS = {
    "q": ("heads", "embed", "attn_in", "q"),
    "k": ("kv_heads", "embed", "attn_in", "k"),
    "v": ("kv_heads", "embed", "attn_in", "v"),
    "o": ("embed", "heads", "attn_mix", "attn_out"),
    "gate": ("mlp", "embed", "mlp_in", "gate"),
    "up": ("mlp", "embed", "mlp_in", "up"),
    "down": ("embed", "mlp", "mlp_hidden", "mlp_out"),
}


def linear(hf: str, role: str, *, bias: bool, part: Part | None = None) -> tuple[ParamSpec, ...]:
    """Rows of the projection `role`: its weight `[out, in]` and, if it has one, its bias; see `Part`."""
    out_axis, in_axis, input_site, output_site = _ENDS[role]
    sites = {"role": role, "input_site": input_site, "output_site": output_site, "part": part}
    weight = ParamSpec(f"{hf}.weight", f"blocks.{role}.weight", (out_axis, in_axis), **sites)
    return (weight, ParamSpec(f"{hf}.bias", f"blocks.{role}.bias", (out_axis,), **sites)) if bias else (weight,)


def fused(hf: str, roles: tuple[str, ...], spec: DecoderSpec, *, bias: bool, transposed: bool = False) -> tuple:
    """Rows of projections that lie below each other in one tensor on disk."""
    sizes = [spec.axis_size(_ENDS[role][0]) for role in roles]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = []
    for role, start in zip(roles, starts, strict=True):
        rows += linear(hf, role, bias=bias, part=Part(start=start, total=sum(sizes), transposed=transposed))
    return tuple(rows)


def alternating(
    hf: str, roles: tuple[str, ...], spec: DecoderSpec, *, bias: bool, groups: int | None = None
) -> tuple[ParamSpec, ...]:
    """Rows of projections that alternate head by head in one tensor on disk, or in so many `groups` of rows."""
    parts = [Part(heads=groups or spec.heads, index=index, of=len(roles)) for index in range(len(roles))]
    return tuple(row for role, part in zip(roles, parts, strict=True) for row in linear(hf, role, bias=bias, part=part))


def grouped(hf: str, spec: DecoderSpec, *, bias: bool) -> tuple[ParamSpec, ...]:
    """Rows of q, k and v in one tensor on disk: of each key-value head its queries, its keys and its values."""
    each = spec.heads // spec.kv_heads
    places = {"q": (0, each), "k": (each, 1), "v": (each + 1, 1)}
    rows = []
    for role, (index, count) in places.items():
        part = Part(heads=spec.kv_heads, index=index, of=each + 2, count=count)
        rows += linear(hf, role, bias=bias, part=part)
    return tuple(rows)


def attention(prefix: str, spec: DecoderSpec, *, o: str = "o_proj") -> tuple[ParamSpec, ...]:
    """Rows of separate q, k, v and o projections."""
    return (
        *linear(f"{prefix}.q_proj", "q", bias=spec.qkv_bias),
        *linear(f"{prefix}.k_proj", "k", bias=spec.qkv_bias),
        *linear(f"{prefix}.v_proj", "v", bias=spec.qkv_bias),
        *linear(f"{prefix}.{o}", "o", bias=spec.o_bias),
    )


def gated_mlp(prefix: str, spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    """Rows of a gated MLP."""
    return (
        *linear(f"{prefix}.gate_proj", "gate", bias=spec.mlp_bias),
        *linear(f"{prefix}.up_proj", "up", bias=spec.mlp_bias),
        *linear(f"{prefix}.down_proj", "down", bias=spec.mlp_bias),
    )


def plain_mlp(prefix: str, spec: DecoderSpec, up: str = "up_proj", down: str = "down_proj") -> tuple[ParamSpec, ...]:
    """Rows of an MLP without a gate."""
    rows = (linear(f"{prefix}.{name}", role, bias=spec.mlp_bias) for name, role in ((up, "up"), (down, "down")))
    return tuple(row for pair in rows for row in pair)


def qk_norms(prefix: str, spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    """Rows of the norms of queries and keys."""
    axes = {
        "none": None,
        "head": (("head_dim",), ("head_dim",)),
        "heads": (("head_count", "head_dim"), ("kv_head_count", "head_dim")),
        "full": (("heads",), ("kv_heads",)),
    }[spec.qk_norm]
    if axes is None:
        return ()
    names = zip(("q_norm", "k_norm"), axes, strict=True)
    return tuple(ParamSpec(f"{prefix}.{name}.weight", f"blocks.{name}.weight", axis) for name, axis in names)


def head(spec: DecoderSpec, hf: str = "lm_head.weight") -> ParamSpec:
    """The row of the output head."""
    return ParamSpec(hf, "head.weight", ("vocab", "embed"), tied_to="embed.weight" if spec.tied_embeddings else None)


def biased_head(spec: DecoderSpec, hf: str = "lm_head") -> tuple[ParamSpec, ...]:
    """The rows of an output head with a bias."""
    return head(spec, f"{hf}.weight"), ParamSpec(f"{hf}.bias", "head.bias", ("vocab",))


def llama_like(
    spec: DecoderSpec,
    *,
    attn_norm: str = "input_layernorm",
    mlp_norm: str = "post_attention_layernorm",
    attn_post_norm: str = "post_attention_layernorm",
    mlp_post_norm: str = "post_feedforward_layernorm",
    attention_rows: tuple[ParamSpec, ...] | None = None,
    mlp_rows: tuple[ParamSpec, ...] | None = None,
) -> tuple[ParamSpec, ...]:
    """Llama's table; norms appear as the spec has them, under these names."""
    layer = "model.layers.{layer}"
    norms = []
    if spec.pre_norm:
        norms += norm(f"{layer}.{attn_norm}", "blocks.attn_norm", spec)
        norms += () if spec.shared_norm else norm(f"{layer}.{mlp_norm}", "blocks.mlp_norm", spec)
    if spec.post_norm:
        norms += norm(f"{layer}.{attn_post_norm}", "blocks.attn_post_norm", spec)
        norms += norm(f"{layer}.{mlp_post_norm}", "blocks.mlp_post_norm", spec)
    own = f"{layer}.self_attn"
    return (
        ParamSpec("model.embed_tokens.weight", "embed.weight", ("vocab", "embed")),
        *norms,
        *(attention(own, spec) if attention_rows is None else attention_rows),
        *qk_norms(own, spec),
        *(gated_mlp(f"{layer}.mlp", spec) if mlp_rows is None else mlp_rows),
        *norm("model.norm", "norm", spec),
        head(spec),
    )


def gpt2_like(
    spec: DecoderSpec, *, attention: tuple[ParamSpec, ...], mlp: tuple[ParamSpec, ...]
) -> tuple[ParamSpec, ...]:
    """Returns the tensor table of GPT-2 with these rows of attention and MLP."""
    layer = "transformer.h.{layer}"
    return (
        ParamSpec("transformer.wte.weight", "embed.weight", ("vocab", "embed")),
        ParamSpec("transformer.wpe.weight", "positions.weight", ("positions", "embed")),
        *norm(f"{layer}.ln_1", "blocks.attn_norm", spec),
        *attention,
        *norm(f"{layer}.ln_2", "blocks.mlp_norm", spec),
        *mlp,
        *norm("transformer.ln_f", "norm", spec),
        head(spec),
    )


def head_size(values: dict[str, Any]) -> int:
    """Returns the size of a head, which divides the hidden size; raises InputError otherwise."""
    if values["hidden"] % values["heads"]:
        raise InputError(f"config.json: {values['heads']} heads do not divide the hidden size {values['hidden']}")
    return values["hidden"] // values["heads"]
