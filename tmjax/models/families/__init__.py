"""Registry of families by Hugging Face `model_type`."""

from collections.abc import Mapping
from typing import Any

from tmjax.errors import InputError
from tmjax.models.families import (
    cohere,
    cohere2,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
    starcoder2,
)
from tmjax.models.families.base import Family

_ALL = (
    cohere,
    cohere2,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
    starcoder2,
)
FAMILIES: Mapping[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _ALL}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config; raises InputError with the list of those supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
