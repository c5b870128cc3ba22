"""GPT-J: parallel branches with one layer norm, neighbouring dimensions rotate, an output head with a bias."""

from typing import Any

from tmjax.models.families.base import Family, Field
from tmjax.models.families.config_values import ConfigView, read_activation, write_activation
from tmjax.models.families.layout import attention, biased_head, head_size, norm, plain_mlp
from tmjax.models.spec import DecoderSpec, ParamSpec, Rotary


def table(spec: DecoderSpec, attention_rows: tuple[ParamSpec, ...]) -> tuple[ParamSpec, ...]:
    """Returns the tensor table with these rows of attention."""
    layer = "transformer.h.{layer}"
    return (
        ParamSpec("transformer.wte.weight", "embed.weight", ("vocab", "embed")),
        *norm(f"{layer}.ln_1", "blocks.attn_norm", spec),
        *attention_rows,
        *plain_mlp(f"{layer}.mlp", spec, "fc_in", "fc_out"),
        *norm("transformer.ln_f", "norm", spec),
        *biased_head(spec),
    )


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    return table(spec, attention("transformer.h.{layer}.attn", spec, o="out_proj"))


def read(view: ConfigView, values: dict[str, Any]) -> dict[str, Any]:
    """Reads what takes more than a table."""
    size = head_size(values)
    return {
        "kv_heads": values["heads"],
        "head_dim": size,
        "activation": read_activation(view, "activation_function", default="gelu_new"),
        "rotary": Rotary(fraction=view.take("rotary_dim", 64) / size, interleaved=True),
    }


def write(spec: DecoderSpec) -> dict[str, Any]:
    """The inverse of `read`."""
    return write_activation(spec, "activation_function") | {"rotary_dim": spec.rotary.dims(spec.head_dim)}


FIELDS = (
    Field("vocab_size", "vocab", 50400),
    Field("n_embd", "hidden", 4096),
    Field("n_layer", "layers", 28),
    Field("n_head", "heads", 16),
    Field("n_inner", "mlp", lambda read: 4 * read["hidden"]),
    Field("n_positions", "max_positions", 2048),
    Field("layer_norm_epsilon", "norm_eps", 1e-5, float),
    Field("tie_word_embeddings", "tied_embeddings", False, bool),
)
FIXED = dict.fromkeys(("norm_bias", "parallel", "shared_norm", "mlp_bias", "head_bias"), True)
FIXED |= {"norm": "layer", "gated": False}
FAMILY = Family("gptj", "GPTJForCausalLM", FIELDS, _params, FIXED, read, write)
