"""Tiny random models of every family, made by transformers: what parity is measured on, by the tests and by
`family_table.py`.

A family may have several cases, where settings exclude each other; together they have every layer kind, every rotary
scaling and both spellings of the settings that transformers 5 renamed. Heads, key-value heads, head size, hidden size
and MLP width differ wherever the config can say so. Weights are sharp, so that every detail of a forward shows.
"""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.errors import InputError

VOCAB = 67
TOKENS = 500
#: Tokens of the two right-padded rows that are no padding: less padding than the smallest window, or PyTorch's softmax
#: over nothing but padding is NaN, which spreads.
REAL = (TOKENS, TOKENS - 30)
TOLERANCE = 1e-4  # of the logits' standard deviation, for the largest difference
KL_TOLERANCE = 1e-6

_ROPE = {"rope_type": "default", "rope_theta": 1000.0}
_HALF = _ROPE | {"partial_rotary_factor": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_RMS = _SIZES | {"rms_norm_eps": 1e-3, "rope_parameters": _ROPE}  # an epsilon large enough to matter
_LAYER = _SIZES | {"layer_norm_eps": 1e-3, "rope_parameters": _ROPE}
_WHOLE = {"hidden_size": 96, "head_dim": None}  # for families whose heads divide the hidden size
_NEOX = {"num_key_value_heads": None}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 600,
    "n_inner": 80,
    "layer_norm_epsilon": 1e-3,
}
_ALIBI = {"vocab_size": VOCAB, "layer_norm_epsilon": 1e-3}
_BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
#: Experts of Qwen's kind; more than a token chooses, and of another width than a dense MLP.
_QWEN_MOE = {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 28}

#: Latent attention with values smaller than a head's keys, and DeepSeek's experts; an indexer that picks all tokens.
_LATENT = {
    "num_key_value_heads": 6,
    "head_dim": None,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 22,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 26,
}
_INDEXER = {"index_topk": 520, "index_n_heads": 4, "index_head_dim": 18}

#: What every case of a family starts from. Values that are None are left out.
BASES: dict[str, dict[str, Any]] = {
    "llama": _RMS | {"hidden_act": "silu"},
    "mistral": _RMS | {"sliding_window": 70},
    "qwen2": _RMS | {"hidden_act": "silu"},
    "qwen3": _RMS,
    "gemma": _RMS | {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _RMS | {"query_pre_attn_scalar": 20, "sliding_window": 60},
    "gemma3_text": _RMS | {"query_pre_attn_scalar": 20, "sliding_window": 60},
    "phi3": _RMS | {"pad_token_id": 0},
    "olmo2": _RMS,
    "smollm3": _RMS | {"pad_token_id": 0},
    "gpt_neox": _LAYER | _WHOLE | _NEOX | {"rope_parameters": _HALF},
    "gpt2": _GPT2,
    "starcoder2": _SIZES | {"norm_epsilon": 1e-3, "rope_parameters": _ROPE},
    "granite": _RMS
    | {
        "hidden_act": "silu",
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
    },
    "cohere": _LAYER | {"logit_scale": 0.3, "pad_token_id": 0},
    "cohere2": _LAYER | _WHOLE | {"logit_scale": 0.3, "sliding_window": 60, "pad_token_id": 0},
    "stablelm": _LAYER | _WHOLE | {"rope_parameters": _HALF},
    "arcee": _RMS | _WHOLE,
    "nemotron": _SIZES | {"norm_eps": 1e-3, "rope_parameters": _HALF},
    "seed_oss": _RMS,
    "olmo3": _RMS | _WHOLE | {"sliding_window": 60, "layer_types": _MIXED, "rope_parameters": _BY_KIND},
    "exaone4": _RMS | _WHOLE | {"sliding_window": 60, "layer_types": _MIXED},
    "glm": _RMS | {"rope_parameters": _HALF, "pad_token_id": 0},
    "glm4": _RMS | {"rope_parameters": _HALF, "pad_token_id": 0},
    "ernie4_5": _RMS,
    "helium": _RMS | _WHOLE | {"head_dim": 16, "pad_token_id": 0},
    "gpt_bigcode": _GPT2,
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 6,
        "intermediate_size": 80,
        "max_position_embeddings": 600,
        "window_size": 60,
        "layer_norm_epsilon": 1e-3,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
    },
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "ffn_dim": 80,
        "max_position_embeddings": 600,
        "word_embed_proj_dim": 48,
    },
    "xglm": {
        "vocab_size": VOCAB,
        "d_model": 48,
        "num_layers": 3,
        "attention_heads": 6,
        "ffn_dim": 80,
        "max_position_embeddings": 600,
    },
    "gpt_oss": _RMS
    | {
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "sliding_window": 60,
        "swiglu_limit": 2.0,
        "rope_parameters": YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2},
    },
    "phi": _LAYER | _WHOLE | {"rope_parameters": _HALF},
    "gptj": _GPT2 | {"n_embd": 96, "rotary_dim": 8},
    "codegen": _GPT2 | {"n_embd": 96, "rotary_dim": 8},
    "bloom": _ALIBI | {"hidden_size": 48, "n_layer": 3, "n_head": 6},
    "mpt": _ALIBI | {"d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 600},
    "falcon": _ALIBI
    | {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "ffn_hidden_size": 80,
        "rope_parameters": _ROPE,
    },
    "qwen3_moe": _RMS | _QWEN_MOE,
    "qwen2_moe": _RMS | _QWEN_MOE | {"shared_expert_intermediate_size": 36},
    "mixtral": _RMS | {"num_local_experts": 7, "num_experts_per_tok": 4},
    "granitemoe": _RMS
    | {
        "num_local_experts": 7,
        "num_experts_per_tok": 4,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
    },
    "glm4_moe": _RMS
    | {
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 28,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "rope_parameters": _HALF,
    },
    "ernie4_5_moe": _RMS
    | {"moe_num_experts": 10, "moe_k": 3, "moe_intermediate_size": 28, "moe_num_shared_experts": 2},
    "minimax_m2": _RMS | {"num_local_experts": 10, "num_experts_per_tok": 3, "rope_parameters": _HALF},
    "deepseek_v2": _RMS | _LATENT | {"n_shared_experts": 2},
    "deepseek_v3": _RMS | _LATENT | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "deepseek_v32": _RMS | _LATENT | _INDEXER | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "glm_moe_dsa": _RMS | _LATENT | _INDEXER | {"first_k_dense_replace": 1},
    "glm4_moe_lite": _RMS | _LATENT,
    "olmoe": _RMS | _WHOLE | {"num_experts": 10, "num_experts_per_tok": 4, "pad_token_id": 0},
}
_OLD = {"rope_parameters": None}  # of transformers 4: rope_theta and rope_scaling
_EXACT = {"truncate": False, "beta_fast": 16, "beta_slow": 2}
_DEEP_YARN = {"rope_parameters": YARN | _EXACT | {"mscale": 0.7, "mscale_all_dim": 0.9}}
_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "grouped": {},
        "tied": {"tie_word_embeddings": True, "hidden_act": "gelu"},
        "ungrouped": {"num_key_value_heads": 6, "hidden_act": "gelu_pytorch_tanh"} | _WHOLE,
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True, "hidden_act": "relu"},
        "llama3": {"rope_parameters": LLAMA3},
        "linear": {"rope_parameters": _ROPE | {"rope_type": "linear", "factor": 3.0}},
        "dynamic": {
            "rope_parameters": _ROPE | {"rope_type": "dynamic", "factor": 4.0},
            "max_position_embeddings": 150,
        },
        "yarn": {"rope_parameters": YARN | {"attn_factor": 0.5}, "head_dim": 32},  # which transformers does not read
        "yarn-exact": {
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2, "attention_factor": 0.8}
        },
        "yarn-mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 2.0}},
        "old-llama3": _OLD
        | {"rope_theta": 5000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    },
    "mistral": {"window": {}, "full": {"sliding_window": None} | _OLD | {"rope_theta": 1000.0}},
    "qwen2": {
        "full": {},
        "tied": {"tie_word_embeddings": True},
        "window": {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2},
        "layer_types": {"use_sliding_window": True, "sliding_window": 37, "layer_types": _MIXED},
        "old-yarn": _OLD
        | {
            "rope_theta": 1000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
    },
    "qwen3": {
        "full": {},
        "window": {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1, "attention_bias": True},
        "tied": {"tie_word_embeddings": True, "rope_parameters": YARN | {"attention_factor": 1.3}},
    },
    "gemma": {
        "tied": {"tie_word_embeddings": True},
        "untied": {"attention_bias": True} | _OLD | {"rope_theta": 1000.0},
    },
    "gemma2": {
        "capped": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
        "uncapped": {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
    },
    "gemma3_text": {
        "linear": {
            "layer_types": _MIXED,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
            "tie_word_embeddings": True,
        },
        "capped": {
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": _ROPE | {"rope_theta": 5000.0},
                "sliding_attention": _ROPE | {"rope_theta": 300.0},
            },
        },
        "old": _OLD
        | {
            "rope_theta": 5000.0,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "sliding_window_pattern": 2,
        },
    },
    "phi3": {
        "window": {"sliding_window": 80, "rope_parameters": _HALF},
        "long": {"original_max_position_embeddings": 128, "rope_parameters": _LONGROPE} | _WHOLE,
        "short": {
            "original_max_position_embeddings": 512,
            "rope_parameters": _LONGROPE,
            "tie_word_embeddings": True,
        }
        | _WHOLE,
        "old-long": _OLD
        | {
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 128,
            # Under the name that the first release had for it; transformers then wants the original length inside too.
            "rope_scaling": {
                "type": "su",
                "original_max_position_embeddings": 128,
                "short_factor": [1.0, 1.1, 1.3, 1.5],
                "long_factor": [2.0, 2.3, 2.9, 3.7],
            },
        }
        | _WHOLE,
    },
    "olmo2": {"plain": {}, "bias": {"attention_bias": True, "tie_word_embeddings": True}},
    "smollm3": {
        "mixed": {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 90,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "full": {
            "no_rope_layers": [0, 1, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        "interval": {"no_rope_layer_interval": 2},
    },
    "gpt_neox": {
        "parallel": {},
        "sequential": {"use_parallel_residual": False, "attention_bias": False},
        "old": _OLD | {"rotary_pct": 0.25, "rotary_emb_base": 1000, "hidden_act": "gelu_fast"},
    },
    "gpt2": {
        "plain": {},
        "inverse": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
        "unscaled": {"scale_attn_weights": False, "tie_word_embeddings": False},
    },
    "starcoder2": {
        "window": {"sliding_window": 77},
        "no_bias": {"use_bias": False, "tie_word_embeddings": True} | _OLD | {"rope_theta": 1000.0},
    },
    "granite": {"plain": {}, "tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}},
    "cohere": {"normed": {"use_qk_norm": True}, "plain": {"attention_bias": True, "tie_word_embeddings": True}},
    "cohere2": {
        "layer_types": {"layer_types": _MIXED},
        "pattern": {"sliding_window_pattern": 2, "attention_bias": True, "tie_word_embeddings": True},
    },
    "stablelm": {
        "normed": {"use_qkv_bias": True, "qk_layernorm": True},
        "parallel": {"use_parallel_residual": True, "tie_word_embeddings": True},
        "old": _OLD | {"rope_theta": 1000, "partial_rotary_factor": 0.25},
    },
    "gpt_oss": {
        "mixed": {},
        "plain": {
            "layer_types": ["full_attention"] * 3,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": _ROPE,
        },
    },
    "phi": {
        "plain": {},
        "grouped": {"num_key_value_heads": 2, "hidden_act": "relu", "tie_word_embeddings": True}
        | _OLD
        | {"rope_theta": 1000.0, "partial_rotary_factor": 0.25},
    },
    "gptj": {"plain": {}, "whole": {"rotary_dim": 16, "activation_function": "relu", "tie_word_embeddings": True}},
    "codegen": {"plain": {}, "whole": {"rotary_dim": 16, "activation_function": "relu", "tie_word_embeddings": True}},
    "bloom": {
        "plain": {},
        "released": {
            "hidden_size": None,
            "n_embed": 48,
            "n_head": None,
            "num_attention_heads": 8,
            "tie_word_embeddings": False,
        },
    },
    "mpt": {
        "plain": {},
        "clipped": {"attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3}, "tie_word_embeddings": False},
    },
    "falcon": {
        "shared": {},
        "alibi": {
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "num_attention_heads": 12,  # of which some have slopes that are rounded
        },
        "grouped": {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
        "one_norm": {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "bias": True},
    },
    "qwen3_moe": {
        "sparse": {"norm_topk_prob": True},
        "plain": {"attention_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        "leading": {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 70},
        "alternating": {"decoder_sparse_step": 2, "norm_topk_prob": True} | _OLD | {"rope_theta": 1000.0},
    },
    "qwen2_moe": {
        "sparse": {},
        "window": {
            "use_sliding_window": True,
            "sliding_window": 70,
            "max_window_layers": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "tie_word_embeddings": True,
        },
    },
    "granitemoe": {"plain": {}, "tied": {"tie_word_embeddings": True, "attention_bias": True}},
    "glm4_moe": {
        "grouped": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "use_qk_norm": True},
        "plain": {
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "ernie4_5_moe": {
        "leading": {"moe_layer_start_index": 1},
        "alternating": {"moe_layer_interval": 2, "moe_num_shared_experts": 0, "tie_word_embeddings": True},
    },
    "minimax_m2": {
        "partial": {},
        "whole": {"rope_parameters": _ROPE, "tie_word_embeddings": True},
    },
    "deepseek_v2": {
        "grouped": {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
        },
        "lite": {"q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True} | _DEEP_YARN,
    },
    "deepseek_v3": {
        "yarn": _DEEP_YARN,
        "plain": {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        }
        | _OLD
        | {"rope_theta": 1000.0},
    },
    "deepseek_v32": {"yarn": _DEEP_YARN, "bias": {"attention_bias": True, "tie_word_embeddings": True}},
    "glm_moe_dsa": {
        "all": {},
        "shared": {
            "indexer_types": ["full", "full", "shared"],
            "mlp_layer_types": ["dense", "dense", "sparse"],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "glm4_moe_lite": {
        "leading": {},
        "listed": {
            "q_lora_rank": None,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "rope_interleave": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "mixtral": {"full": {}, "window": {"sliding_window": 70, "tie_word_embeddings": True}},
    "olmoe": {
        "plain": {},
        "normalised": {"norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
    },
    "arcee": {"plain": {}, "bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}},
    "nemotron": {
        "plain": {},
        "bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "old": _OLD | {"rope_theta": 1000.0, "partial_rotary_factor": 0.25},
    },
    "seed_oss": {
        "plain": {},
        "bias": {
            "attention_bias": False,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "olmo3": {
        "mixed": {},
        "old": _OLD
        | {
            "layer_types": None,
            "num_hidden_layers": 4,
            "rope_theta": 1000.0,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
    },
    "exaone4": {
        "mixed": {},
        "full": {"sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
        "pattern": {"layer_types": None, "sliding_window_pattern": 2},
    },
    "glm": {"plain": {}, "no_bias": {"attention_bias": False, "tie_word_embeddings": True}},
    "glm4": {"plain": {}, "no_bias": {"attention_bias": False, "tie_word_embeddings": True}},
    "ernie4_5": {"plain": {}, "bias": {"use_bias": True, "tie_word_embeddings": True}},
    "helium": {"plain": {}, "bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}},
    "gpt_bigcode": {
        "shared": {},
        "heads": {"multi_query": False, "tie_word_embeddings": False, "scale_attn_weights": False},
    },
    "gpt_neo": {
        "mixed": {},
        "global": {"attention_types": [[["global"], 3]], "tie_word_embeddings": False, "activation_function": "relu"},
    },
    "opt": {"plain": {}, "no_bias": {"enable_bias": False, "tie_word_embeddings": False}},
    "xglm": {
        "plain": {},
        "unscaled": {"scale_embedding": False, "tie_word_embeddings": False, "activation_function": "relu"},
    },
}
#: End of the name of a router's bias, which some models keep as a buffer.
_CHOICE_BIAS = "e_score_correction_bias"
#: Keys that a case sets to null on purpose.
_NULLABLE = frozenset({"sliding_window", "q_lora_rank", "attn_logit_softcapping", "final_logit_softcapping"})


def _config(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    merged = {"model_type": model_type} | BASES[model_type] | changes
    return {key: value for key, value in merged.items() if value is not None or key in _NULLABLE}


#: Config of every case, as it might stand in a `config.json`, by `model_type-case`.
CASES = {f"{kind}-{name}": _config(kind, changes) for kind, cases in _CASES.items() for name, changes in cases.items()}


def plainly(model_type: str) -> dict[str, str]:
    """Arguments by which transformers makes a model in plain PyTorch: the faster products of experts know no float64.

    Falcon's plain attention adds the biases of ALiBi twice, its fused one as often as the model was trained with.
    """
    attention = "sdpa" if model_type == "falcon" else "eager"
    return {"attn_implementation": attention, "experts_implementation": "eager"}


def make_reference(name: str, directory: Path) -> Any:
    """Writes the checkpoint of a case and returns PyTorch's model of it, to compare with.

    Matrices are N(0, 2 / sqrt(fan in)), norm weights and biases 0.3 away from what they start as. The model computes in
    float64 (but for norms, softmax and rotary angles, which PyTorch's modules keep in float32), so that nearly all the
    noise in a comparison is ours.
    """
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing: the reference models are PyTorch's, install torch") from None
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(CASES[name]))  # which it would change in place
    reference = transformers.AutoModelForCausalLM.from_config(config, **plainly(config.model_type)).eval()
    with torch.no_grad():
        for path, module in reference.named_modules():
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1 and "norm" not in path:
                    fan_in = parameter.shape[0 if type(module).__name__ == "Conv1D" else -1]
                    parameter.normal_(0, 2 / math.sqrt(fan_in))
                else:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        for path, buffer in reference.named_buffers():
            if path.endswith(_CHOICE_BIAS):
                buffer.add_(0.3 * torch.randn_like(buffer))
    reference.save_pretrained(directory)
    return reference.double()


def padded_batch() -> tuple[np.ndarray, np.ndarray]:
    """Token ids [2, TOKENS], right-padded, and which of them are real."""
    ids = np.random.default_rng(0).integers(1, VOCAB, (2, TOKENS), dtype=np.int32)
    real = np.arange(TOKENS)[None] < np.array(REAL)[:, None]
    return np.where(real, ids, 0).astype(np.int32), real


def reference_logits(reference: Any, ids: np.ndarray, real: np.ndarray) -> np.ndarray:
    """PyTorch's logits [B, T, vocab], the padding masked."""
    import torch

    usual = torch.get_default_dtype()
    # XGLM makes a number of the model's dtype without saying so.
    torch.set_default_dtype(next(reference.parameters()).dtype if reference.config.model_type == "xglm" else usual)
    try:
        with torch.no_grad():
            ids, mask = torch.from_numpy(ids).long(), torch.from_numpy(real).long()
            return reference(ids, attention_mask=mask, use_cache=False).logits.numpy()
    finally:
        torch.set_default_dtype(usual)


def deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the standard deviation."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / theirs.std())


def mean_kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL(theirs || ours) over tokens, in float64."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    log_p, log_q = log_softmax(theirs), log_softmax(ours)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
