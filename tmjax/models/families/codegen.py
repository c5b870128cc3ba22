"""CodeGen: GPT-J whose q, v and k alternate in four parts of one tensor, as it was trained on four devices."""

from tmjax.models.families import gptj
from tmjax.models.families.base import Family
from tmjax.models.families.layout import alternating, linear
from tmjax.models.spec import DecoderSpec, ParamSpec

_PARTS = 4


def _params(spec: DecoderSpec) -> tuple[ParamSpec, ...]:
    own = "transformer.h.{layer}.attn"
    rows = alternating(f"{own}.qkv_proj", ("q", "v", "k"), spec, bias=False, groups=_PARTS)
    return gptj.table(spec, (*rows, *linear(f"{own}.out_proj", "o", bias=False)))


FAMILY = Family("codegen", "CodeGenForCausalLM", gptj.FIELDS, _params, gptj.FIXED, gptj.read, gptj.write)
