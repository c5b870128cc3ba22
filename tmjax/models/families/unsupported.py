"""Reasons why a `model_type` has no table: features of its architecture that the decoder lacks, read from its config.

Experts and latent attention are named as well: the decoder has them, but a table says how a family routes and stores
them. Features are recognised by their config keys, so that a family unknown today is described too.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tmjax.models.families.quantised import quantisation

#: Keys under which multimodal configs hold their text model, in the order in which they are looked at.
_TEXT = ("text_config", "language_config", "llm_config", "thinker_config", "text_model_config")
_TOWERS = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "visual", "speech_config")
_EXPERTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "n_experts",
)
_MOE = ("moe_intermediate_size", "num_experts_per_tok", "decoder_sparse_step", "ffn_config")
_FURTHER = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
_MAMBA = ("mamba_num_heads", "mamba_d_state", "mamba_d_ssm", "mamba_n_heads", "ssm_cfg", "state_size", "ssm_state_size")
_LINEAR = ("linear_num_key_heads", "linear_attn_config", "lin_conf", "attention_type_list")
#: Model types whose kind no key of their config shows.
_ENCODERS = frozenset(
    "bert roberta xlm-roberta distilbert albert electra deberta deberta-v2 modernbert mpnet nomic_bert esm".split()  # noqa: SIM905
)
_RECURRENT = frozenset("mamba mamba2 falcon_mamba rwkv rwkv7 recurrent_gemma xlstm".split())  # noqa: SIM905
_TRANSLATORS = frozenset("t5 mt5 umt5 bart mbart pegasus m2m_100 marian blenderbot t5gemma".split())  # noqa: SIM905
#: Heads whose outputs are multiplied by a gate of the input.
_GATED_HEADS = frozenset({"step3p5", "step3p7"})


def _positive(config: Mapping[str, Any], keys: tuple[str, ...], minimum: int = 1) -> tuple[str, int] | None:
    """The first of the keys whose value is an integer of at least `minimum`."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
            return key, value
    return None


def _experts(config: Mapping[str, Any]) -> str | None:
    entry = _positive(config, _EXPERTS, 2)
    if entry is None:
        ffn = config.get("ffn_config")
        entry = _positive(ffn, _EXPERTS, 2) if isinstance(ffn, dict) else None
    if entry:
        return f"a mixture of experts ({entry[0]} {entry[1]})"
    return "a mixture of experts" if _positive(config, _MOE[:2]) else None


def _latent(config: Mapping[str, Any]) -> str | None:
    if _positive(config, ("kv_lora_rank",)):
        return f"multi-head latent attention (kv_lora_rank {config['kv_lora_rank']})"
    if _positive(config, ("q_lora_rank",)) and _positive(config, ("qk_rope_head_dim",)):
        return f"low-rank queries with a rotary part of their own (q_lora_rank {config['q_lora_rank']})"
    return None


def _mixed(config: Mapping[str, Any]) -> str | None:
    pattern = config.get("hybrid_override_pattern")
    kinds = config.get("layer_types")
    kinds = {kind for kind in kinds if isinstance(kind, str)} if isinstance(kinds, list) else set()
    if (isinstance(pattern, str) and "M" in pattern) or _positive(config, _MAMBA) or "mamba" in kinds:
        return "Mamba layers (a hybrid)"
    if "linear_attention" in kinds or any(config.get(key) for key in _LINEAR):
        return "linear-attention layers (a hybrid)"
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    return f"layers of the kind {', '.join(unknown)}" if unknown else None


def _sparse(config: Mapping[str, Any]) -> str | None:
    if _positive(config, ("index_topk",)):
        return f"sparse attention to tokens that an indexer picks (index_topk {config['index_topk']})"
    if config.get("sparse_attention_config"):
        return "sparse attention (sparse_attention_config)"
    if _positive(config, ("attention_chunk_size",)) and not config.get("sliding_window"):  # which wins over it
        return f"attention in chunks (attention_chunk_size {config['attention_chunk_size']})"
    return None


def _streams(config: Mapping[str, Any]) -> str | None:
    if _positive(config, ("hc_mult",), 2):
        return f"several residual streams (hc_mult {config['hc_mult']})"
    if config.get("block_configs"):
        return "layers of different shapes (block_configs)"
    if _positive(config, ("hidden_size_per_layer_input",)):
        return "embeddings of every layer's own (hidden_size_per_layer_input)"
    return None


def _heads(config: Mapping[str, Any]) -> str | None:
    sizes = config.get("head_dim"), config.get("v_head_dim")
    if all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1] and not config.get("kv_lora_rank"):
        return f"value heads of another size than the key heads (v_head_dim {sizes[1]})"
    if _positive(config, ("global_head_dim",)):
        return f"heads of another size in layers without a window (global_head_dim {config['global_head_dim']})"
    return None


def _sinks(config: Mapping[str, Any]) -> str | None:
    biased = any(config.get(key) is True for key in ("add_swa_attention_sink_bias", "add_full_attention_sink_bias"))
    return "attention sinks in some layers" if biased else None


def _further(config: Mapping[str, Any]) -> str | None:
    entry = _positive(config, _FURTHER)
    return f"layers that predict further tokens ({entry[0]} {entry[1]})" if entry else None


_FEATURES: tuple[Callable[[Mapping[str, Any]], str | None], ...] = (
    _experts,
    _latent,
    _mixed,
    _sparse,
    _streams,
    _heads,
    _sinks,
    _further,
)


def _features(config: Mapping[str, Any]) -> Iterator[str]:
    """Names of the features that the decoder lacks."""
    kind = str(config.get("model_type"))
    if config.get("is_encoder_decoder") is True or kind in _TRANSLATORS:
        yield "an encoder and a decoder"
    elif kind in _ENCODERS:
        yield "an encoder, which predicts no next token"
    elif kind in _RECURRENT:
        yield "recurrent layers"
    elif kind in _GATED_HEADS:
        yield "gates of attention heads"
    yield from filter(None, (feature(config) for feature in _FEATURES))


def reason(config: Mapping[str, Any], supported: frozenset[str]) -> str:
    """Explains why a config of a `model_type` without a table cannot be used: `: it has ...`, empty if no key shows it.

    `supported` are the model types with a table.
    """
    clauses = []
    text = next((config[key] for key in _TEXT if isinstance(config.get(key), dict)), None)
    tower = any(config.get(key) for key in _TOWERS)
    if text is not None:
        kind = text.get("model_type")
        clauses.append(f"is a multimodal wrapper{f', whose text model is a {kind}' if isinstance(kind, str) else ''}")
        inner = [] if kind in supported else list(_features(text))
        if inner:
            clauses.append(f"has {', '.join(inner)}")
        elif kind in supported:
            clauses.append("can be used once its text model is saved by itself")
    elif tower:
        clauses.append("is a multimodal wrapper")
    outer = list(_features({key: value for key, value in config.items() if key not in _TEXT}))
    if outer:
        clauses.append(f"has {', '.join(outer)}")
    packed = quantisation(config)
    if packed:
        clauses.append(f"has quantised weights ({packed})")
    return f": it {', and it '.join(clauses)}" if clauses else ""
