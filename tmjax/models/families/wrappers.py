"""Multimodal wrappers whose text model has a family: its config out of theirs, its tensors among theirs.

A wrapper is read as its text model, on text alone. Multimodal rotary embeddings (mrope) then are plain ones, since the
three positions of a text token are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_QWEN2_VL = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
}
#: By the `model_type` of a text config: its family, and the values that transformers takes for keys that are left out.
TEXTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "qwen3_vl_text": (
            "qwen3",
            {
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 22016,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "max_position_embeddings": 128000,
                "rms_norm_eps": 1e-6,
                "rope_theta": 5e5,
            },
        ),
        "qwen3_vl_moe_text": (
            "qwen3_moe",
            {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "max_position_embeddings": 128000,
                "rms_norm_eps": 1e-6,
                "moe_intermediate_size": 1408,
                "num_experts_per_tok": 4,
                "num_local_experts": 60,
            },
        ),
        "qwen2_5_vl_text": ("qwen2", _QWEN2_VL),
        "qwen2_vl_text": ("qwen2", _QWEN2_VL),
        "gemma3_text": (
            "gemma3_text",
            {
                "vocab_size": 262208,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-6,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
            },
        ),
        "llama": ("llama", _LLAMA),
        "deepseek_v3": ("deepseek_v3", _DEEPSEEK_V3),
        "kimi_k2": ("deepseek_v3", _DEEPSEEK_V3),
        "mistral": (
            "mistral",
            _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        ),
        "qwen2": (
            "qwen2",
            _LLAMA | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
        ),
    }
)
#: Wrappers, and whether transformers ties the embeddings of each where its config does not say.
TIED: Mapping[str, bool] = MappingProxyType(
    {
        "gemma3": True,
        "kimi_k25": True,
        "llava": False,
        "llava_next": False,
        "llava_onevision": False,
        "mistral3": True,
        "qwen2_5_vl": False,
        "qwen2_vl": False,
        "qwen3_vl": False,
        "qwen3_vl_moe": False,
    }
)
#: Text models of configs that are not nested, as old Qwen 2 VL configs are.
_FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
#: Beginnings of the names of the text model's tensors, and what they are in its family's table.
_TEXT_NAMES = (
    ("model.language_model.model.", "model."),
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
#: Beginnings of the names of all other tensors, with or without `model.` before them.
_TOWERS = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "mm_projector.", "image_newline")
#: Settings that the text models have whatever their configs say, and those whose experts lie in one tensor a layer.
_ALWAYS = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
_FUSED = frozenset({"qwen3_vl_moe"})
_MROPE = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class Wrapper:
    """A multimodal wrapper: its `model_type`, and the config of its text model in the terms of a supported family."""

    model_type: str
    config: Mapping[str, Any]

    @property
    def note(self) -> str:
        """What a user should know of such a checkpoint."""
        return f"of the multimodal {self.model_type} the text model is read, as {self.config['model_type']}"

    @property
    def has_fused_experts(self) -> bool:
        """Whether all experts of a layer lie in one tensor."""
        return self.model_type in _FUSED

    @staticmethod
    def text_name(name: str) -> str | None:
        """Returns the name of a stored tensor in the family's table; None for a tensor of another part."""
        if name.removeprefix("model.").startswith(_TOWERS):
            return None
        return next((new + name.removeprefix(old) for old, new in _TEXT_NAMES if name.startswith(old)), name)


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """Reads the config of a wrapper whose text model has a family.

    Args:
        config: Content of `config.json`.

    Returns:
        The wrapper; None if the config is of no such wrapper.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in TIED:
        return None
    text = config.get("text_config")
    if not isinstance(text, dict):
        if kind not in _FLAT or "hidden_size" not in config:
            return None
        text = {key: value for key, value in config.items() if not key.startswith(("vision", "image", "video"))}
        text["model_type"] = _FLAT[kind]
    text_kind = text.get("model_type", _FLAT.get(kind))
    if text_kind not in TEXTS:
        return None
    family, defaults = TEXTS[text_kind]
    outer = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if config.get(key) is not None}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", TIED[kind]))
    values = dict(defaults) | outer | {key: _plain_rotary(key, value) for key, value in text.items()}
    # Embeddings are tied by the wrapper's own word; the class of the whole is not that of the text model.
    values |= {"model_type": family, "tie_word_embeddings": tied} | _ALWAYS.get(text_kind, {})
    values.pop("architectures", None)
    return Wrapper(kind, values)


def _plain_rotary(key: str, value: Any) -> Any:
    """Settings of rotary embeddings without those of multimodal positions."""
    if key not in ("rope_scaling", "rope_parameters") or not isinstance(value, dict):
        return value
    plain = {name: item for name, item in value.items() if name not in _MROPE}
    return {name: "default" if item == "mrope" else item for name, item in plain.items()}
