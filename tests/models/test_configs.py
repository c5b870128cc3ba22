"""The config tables: both ways, against transformers' reading, and every config that is refused."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import transformers
from helpers import SPEC, edit_config, refused
from hypothesis import given, settings

from tmjax.errors import InputError
from tmjax.models.blocks.low_rank import Indexer, Latent
from tmjax.models.experts.mixture import Experts
from tmjax.models.families import FAMILIES, family_of
from tmjax.models.generate import DecodingOptions, generate
from tmjax.models.spec import FULL_ATTENTION, Alibi, DecoderSpec, Rotary
from tools.family_cases import CASES
from tools.make_checkpoint import make_checkpoint

# Floats that a config may hold; a few digits, as people write them.
positive = st.floats(0.01, 100)
thetas = st.floats(10, 1e7)
positions = st.integers(16, 10**6)


def rotaries(kind: str, planes: int, max_positions: int, **fixed) -> st.SearchStrategy[Rotary]:
    """Of one scaling; `planes` says how many factors LongRoPE has."""
    factors = st.lists(st.floats(1, 50), min_size=planes, max_size=planes).map(tuple)
    own = {
        "default": {},
        "linear": {"factor": st.floats(1, 64)},
        "dynamic": {"factor": st.floats(1, 64), "original_positions": st.just(max_positions)},
        "llama3": {
            "factor": st.floats(1, 64),
            "low_freq_factor": st.floats(0.5, 2),
            "high_freq_factor": st.floats(2.5, 8),
            "original_positions": positions,
        },
        "yarn": {
            "factor": st.floats(1, 64),
            "original_positions": positions,
            "beta_fast": st.floats(8, 64),
            "beta_slow": st.floats(0.5, 4),
            "truncate": st.booleans(),
            "attention_factor": positive,
        },
        "longrope": {
            "factor": st.floats(1, 64),
            "original_positions": positions,
            "short_factors": factors,
            "long_factors": factors,
            "attention_factor": positive,
        },
    }[kind]
    return st.builds(Rotary, theta=thetas, scaling=st.just(kind), **own, **{k: st.just(v) for k, v in fixed.items()})


SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
#: Families whose heads divide the hidden size, and those without key-value heads of their own.
WHOLE_HEADS = {
    "cohere2",
    "gpt2",
    "gpt_neox",
    "phi3",
    "stablelm",
    "arcee",
    "helium",
    "gpt_bigcode",
    "gpt_neo",
    "olmoe",
    "opt",
    "xglm",
    "bloom",
    "codegen",
    "falcon",
    "gptj",
    "mpt",
    "phi",
    "deepseek_v2",
}
LATENT = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite"}
UNGROUPED = LATENT | {"gpt2", "gpt_neox", "gpt_bigcode", "gpt_neo", "opt", "xglm", "bloom", "codegen", "gptj", "mpt"}
PARTIAL = {
    "gpt_neox",
    "phi3",
    "stablelm",
    "nemotron",
    "glm",
    "glm4",
    "glm4_moe",
    "minimax_m2",
    "codegen",
    "gptj",
    "phi",
}
INTERLEAVED = {
    "deepseek_v2",
    "deepseek_v32",
    "glm_moe_dsa",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "ernie4_5",
    "ernie4_5_moe",
    "helium",
    "codegen",
    "gptj",
}
NO_ROTARY = Rotary(scaling="none")


@st.composite
def mixtures(draw, layers: int, mlp: int) -> dict[str, Experts]:
    """Experts by family, whose settings are those that the family's configs can say."""
    groups, width, shared = draw(st.integers(1, 3)), draw(st.integers(1, 4096)), draw(st.integers(1, 3))
    count = groups * draw(st.integers(2, 8))
    base = Experts(count, draw(st.integers(1, count)), mlp)
    wide, normalised = dataclasses.replace(base, width=width), draw(st.booleans())
    any_layers = tuple(draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1)))
    first, last = sorted(draw(st.lists(st.integers(0, layers - 1), min_size=2, max_size=2)))
    leading, around = tuple(range(first)), tuple(n for n in range(layers) if not first <= n <= last)
    qwen = dataclasses.replace(wide, normalised=normalised, dense=tuple(sorted(any_layers)))
    biased = dataclasses.replace(wide, choice_bias=True, shared_width=width * shared)
    opened = draw(st.integers(1, groups))
    grouped = {"groups": groups, "chosen_groups": opened, "scale": draw(positive)}
    grouped |= {"chosen": min(base.chosen, count // groups * opened)}  # as many as are open
    deepseek = dataclasses.replace(biased, router="sigmoid", normalised=normalised, dense=qwen.dense, **grouped)
    cut = {"logit_bias": True, "bias": True, "limit": draw(positive), "gain": draw(positive)}
    return {
        "gpt_oss": dataclasses.replace(base, **cut),
        "mixtral": base,
        "granitemoe": base,
        "olmoe": dataclasses.replace(base, normalised=normalised),
        "minimax_m2": dataclasses.replace(base, router="sigmoid", choice_bias=True),
        "qwen3_moe": qwen,
        "qwen2_moe": dataclasses.replace(qwen, shared_width=draw(st.integers(1, 4096)), shared_gate=True),
        "glm4_moe": dataclasses.replace(biased, router="sigmoid", normalised=normalised, dense=leading, **grouped),
        "ernie4_5_moe": dataclasses.replace(biased, dense=around),
        "deepseek_v2": dataclasses.replace(
            biased,
            choice_bias=False,
            normalised=False,
            dense=leading,
            group_best=1,
            **(grouped if groups > 1 else {"scale": grouped["scale"]}),
        ),
        "deepseek_v3": dataclasses.replace(deepseek, dense=leading),
        "deepseek_v32": deepseek,
        "glm_moe_dsa": deepseek,
        "glm4_moe_lite": deepseek,
    }


@st.composite
def specs(draw, model_type: str) -> DecoderSpec:
    kv_heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    heads = kv_heads * (1 if model_type in UNGROUPED else draw(st.integers(1, 4)))
    head_dim = 8 * draw(st.integers(2 if model_type in LATENT else 1, 4))
    rotary_dim = 8 * draw(st.integers(1, head_dim // 8 - 1)) if model_type in LATENT else head_dim
    max_positions = draw(positions)
    flag, other, third = (draw(st.booleans()) for _ in range(3))
    size = draw(st.integers(1, 10**6))
    sizes = st.lists(st.sampled_from([size, FULL_ATTENTION]), min_size=layers, max_size=layers)
    mixed = tuple(draw(sizes.filter(lambda w: min(w) < FULL_ATTENTION) | st.just(())))
    alike = (size,) * layers if third else ()
    fraction = draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])) if model_type in PARTIAL else rotary_dim / head_dim
    kind = draw(st.sampled_from(("default", "longrope") if model_type == "phi3" else SCALINGS))
    loose = model_type in ("deepseek_v3", "glm4_moe_lite") and other
    fixed = {"fraction": fraction, "interleaved": model_type in INTERLEAVED or loose}
    planes = int(head_dim * fraction) // 2
    rotary = draw(rotaries(kind, planes, max_positions, **fixed))
    hidden = heads * (head_dim if model_type in WHOLE_HEADS else draw(st.integers(1, 100)))
    attention_bias = {"qkv_bias": flag, "o_bias": flag}
    caps = {
        "logit_cap": draw(st.none() | positive),
        "attention_scale": float(draw(st.integers(1, 1000))) ** -0.5,
    }
    gemma = attention_bias | {"norm_offset": True, "embedding_scale": math.sqrt(hidden)}
    gemma2 = gemma | caps | {"post_norm": True, "windows": mixed}
    layer = {"norm": "layer", "norm_bias": True}
    cohere = attention_bias | {
        "norm": "layer",
        "parallel": True,
        "shared_norm": True,
        "logit_scale": draw(positive),
    }
    learned = layer | {"gated": False, "o_bias": True, "mlp_bias": True, "learned_positions": True, "rotary": NO_ROTARY}
    scale = {"attention_scale": 1.0 if flag else None}
    after = {"pre_norm": False, "post_norm": True}
    rolled = tuple(int(window != FULL_ATTENTION) for window in mixed) or (0,) * layers
    mlp = draw(st.integers(1, 10**5))
    experts = {name: {"experts": value} for name, value in draw(mixtures(layers, mlp)).items()}
    granite = attention_bias | {
        "mlp_bias": other,
        "embedding_scale": draw(positive),
        "residual_scale": draw(positive),
        "attention_scale": draw(positive),
        "logit_scale": 1.0 / draw(positive),
    }
    biased = layer | {"gated": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True}
    one_norm = {"parallel": True, "shared_norm": True, "head_bias": True}
    gptj = layer | one_norm | {"gated": False, "mlp_bias": True, "rotary": Rotary(**fixed)}
    alibi = {"rotary": NO_ROTARY, "alibi": Alibi()}
    latent = Latent(
        draw(st.integers(1, 100)),
        rotary_dim,
        draw(st.integers(1, head_dim)),
        draw(st.integers(0, 100)),
        draw(positive) if kind == "yarn" and third else 0.0,
    )
    picked = max_positions + draw(st.integers(0, 100)), draw(st.integers(1, 64)), draw(st.integers(1, 200))
    shared = tuple(sorted(draw(st.sets(st.integers(0, layers - 1))) | {0}))
    indexed = {name: Indexer(*picked, own) for name, own in (("all", tuple(range(layers))), ("shared", shared))}
    indexed = {
        name: attention_bias
        | {
            "latent": dataclasses.replace(latent, q_rank=latent.q_rank or 1, indexer=own),
            "max_positions": max_positions,
        }
        for name, own in indexed.items()
    }
    own = {
        "deepseek_v2": attention_bias | {"latent": latent},
        "deepseek_v3": attention_bias | {"latent": latent},
        "deepseek_v32": indexed["all"],
        "glm_moe_dsa": indexed["shared"],
        "glm4_moe_lite": attention_bias | {"latent": latent},
        "bloom": biased | alibi | {"mlp": 4 * hidden, "embedding_norm": True, "activation": "gelu_tanh"},
        "codegen": gptj,
        "gptj": gptj,
        "mpt": alibi
        | {
            "norm": "layer",
            "gated": False,
            "mlp": 4 * hidden,
            "activation": "gelu",
            "qkv_clip": draw(st.none() | positive),
            "attention_scale": draw(st.none() | positive),
        },
        "phi": biased | one_norm,
        "falcon": layer
        | {"gated": False, "qkv_bias": third, "o_bias": third, "mlp_bias": third, "parallel": other}
        | ({"shared_norm": draw(st.booleans())} if other else {"kv_heads": draw(st.sampled_from([1, heads]))})
        | ({"rotary": NO_ROTARY, "alibi": Alibi(head_dim**-0.5, rounded=True)} if flag else {}),
        "gpt_oss": attention_bias | {"windows": mixed, "sinks": True, "activation": "silu"},
        "llama": attention_bias | {"mlp_bias": other},
        "mistral": {"windows": alike},
        "qwen2": {"qkv_bias": True, "windows": mixed},
        "qwen3": attention_bias | {"windows": mixed, "qk_norm": "head"},
        "gemma": gemma | {"activation": draw(st.sampled_from(["silu", "gelu_tanh", "relu"]))},  # gelu means gelu_tanh
        "gemma2": gemma2 | {"attention_cap": draw(st.none() | positive)},
        "gemma3_text": gemma2
        | {
            "qk_norm": "head",
            "local_rotary": draw(rotaries("default", planes, max_positions)),
            "layer_rotary": rolled,
        },
        "phi3": {"windows": alike},
        "olmo2": attention_bias | after | {"qk_norm": "full"},
        "smollm3": attention_bias
        | {
            "mlp_bias": other,
            "windows": mixed,
            "local_rotary": NO_ROTARY,
            "layer_rotary": tuple(draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))),
        },
        "gpt_neox": layer | attention_bias | {"gated": False, "mlp_bias": True, "parallel": other},
        "gpt2": learned | scale | {"qkv_bias": True, "inverse_layer_scale": other},
        "gpt_bigcode": learned | scale | {"qkv_bias": True, "kv_heads": heads if other else 1},
        "gpt_neo": learned | {"attention_scale": 1.0, "windows": mixed},
        "xglm": learned
        | {
            "qkv_bias": True,
            "learned_positions": False,
            "sinusoidal_positions": True,
            "position_offset": 2,
            "norm_eps": 1e-5,
            "embedding_scale": math.sqrt(hidden) if flag else 1.0,
        },
        "opt": learned | {"qkv_bias": flag, "o_bias": flag, "mlp_bias": flag, "position_offset": 2, "norm_eps": 1e-5},
        "arcee": attention_bias | {"mlp_bias": other, "gated": False},
        "nemotron": layer | attention_bias | {"mlp_bias": other, "gated": False, "norm_offset": True},
        "seed_oss": {"qkv_bias": flag, "o_bias": other, "mlp_bias": third},
        "olmo3": attention_bias
        | after
        | {
            "qk_norm": "full",
            "windows": mixed,
            "local_rotary": draw(rotaries("default", planes, max_positions)),
            "layer_rotary": rolled,
        },
        "exaone4": after
        | {"qk_norm": "head", "windows": mixed}
        | ({"local_rotary": NO_ROTARY, "layer_rotary": tuple(1 - number for number in rolled)} if mixed else {}),
        "glm": {"qkv_bias": flag},
        "glm4": {"qkv_bias": flag, "post_norm": True},
        "ernie4_5": attention_bias | {"mlp_bias": flag},
        "helium": {"qkv_bias": flag, "mlp_bias": other},
        "starcoder2": layer | attention_bias | {"mlp_bias": flag, "gated": False, "windows": alike},
        "granite": granite,
        "cohere": cohere | {"qk_norm": "heads" if other else "none"},
        "cohere2": cohere
        | {
            "windows": mixed,
            "local_rotary": Rotary(scaling="none", interleaved=True),
            "layer_rotary": tuple(1 - number for number in rolled),
        },
        "stablelm": layer
        | {"qkv_bias": flag, "parallel": other, "shared_norm": other, "qk_norm": "heads" if third else "none"},
        "mixtral": {"windows": alike},
        "qwen2_moe": {"qkv_bias": flag, "windows": mixed},
        "qwen3_moe": attention_bias | {"windows": alike, "qk_norm": "head"},
        "olmoe": attention_bias | {"qk_norm": "full"},
        "granitemoe": granite | {"mlp_bias": False},
        "glm4_moe": {"qkv_bias": flag, "qk_norm": "head" if other else "none"},
        "minimax_m2": {"qk_norm": "full"},
        "ernie4_5_moe": {},
    }[model_type]
    values = {
        "vocab": draw(st.integers(1, 10**6)),
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp": mlp,
        "max_positions": max_positions,
        "norm_eps": draw(st.floats(1e-8, 1e-2)),
        "rotary": rotary,
        "activation": draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
        "tied_embeddings": draw(st.booleans()),
    }
    return DecoderSpec(**(values | own | experts.get(model_type, {})))


def read_by_transformers(directory: Path, model_type: str) -> DecoderSpec:
    """The spec that transformers' reading of a config amounts to, field by field."""
    config = transformers.AutoConfig.from_pretrained(directory)
    assert config.model_type == model_type
    rope = dict(config.rope_parameters)
    names = {
        "rope_theta": "theta",
        "rope_type": "scaling",
        "original_max_position_embeddings": "original_positions",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
    }
    rope = {key: tuple(value) if isinstance(value, list) else value for key, value in rope.items()}
    activations = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    bias = getattr(config, "attention_bias", False)
    return DecoderSpec(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        rotary=Rotary(**{names.get(key, key): value for key, value in rope.items() if key != "type"}),
        activation=activations.get(config.hidden_act, config.hidden_act),
        qkv_bias=bias or model_type == "qwen2",
        o_bias=bias,
        mlp_bias=getattr(config, "mlp_bias", False),
        tied_embeddings=config.tie_word_embeddings,
        windows=tuple(
            config.sliding_window if kind == "sliding_attention" else FULL_ATTENTION for kind in config.layer_types
        )
        if getattr(config, "sliding_window", None) and "sliding_attention" in config.layer_types
        else (),
    )


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=20)
@given(st.data())
def test_config_both_ways(tmp_path_factory, model_type, data):
    spec = data.draw(specs(model_type))
    config = FAMILIES[model_type].config(spec)
    assert family_of(config) is FAMILIES[model_type]
    assert FAMILIES[model_type].spec(config) == spec
    directory = tmp_path_factory.mktemp("config")
    (directory / "config.json").write_text(json.dumps(config))
    if model_type in ("llama", "qwen2") and spec.rotary.scaling != "dynamic":
        assert read_by_transformers(directory, model_type) == spec
    full = transformers.AutoConfig.from_pretrained(directory).to_dict()
    assert FAMILIES[model_type].spec(full) == spec


MINIMAL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": None, "head_dim": None},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "rope_type": "llama3"} | LLAMA3},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7e3},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "qwen2", "use_sliding_window": True},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": None},
        {"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 1, "sliding_window": 9},
        {"model_type": "qwen2", "max_window_layers": 24, "sliding_window": 32768, "use_mrope": False},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
    ],
    ids=str,
)
def test_handwritten_configs_read_as_transformers_reads_them(tmp_path, config):
    config = {"model_type": "llama"} | MINIMAL | config
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert family_of(config).spec(config) == read_by_transformers(tmp_path, config["model_type"])


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "llama3"} | LLAMA3], ids=str)
def test_old_and_new_rope_spelling_read_equal(scaling):
    new = MINIMAL | {"rope_parameters": {"rope_theta": 3e4} | scaling}
    old = MINIMAL | {"rope_theta": 3e4, "rope_scaling": scaling}
    older = MINIMAL | {"rope_theta": 3e4, "rope_scaling": {"type": scaling["rope_type"]} | scaling}
    own_keys = {
        "bloom",
        "codegen",
        "falcon",
        "gptj",
        "mpt",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gemma3_text",
        "olmo3",
        "opt",
        "xglm",
    } | LATENT  # of tests/models/test_parity.py, whose cases have their old spellings
    for family in (FAMILIES[name] for name in FAMILIES.keys() - own_keys - ({"phi3"} if len(scaling) > 1 else set())):
        assert family.spec(new) == family.spec(old) == family.spec(older)
        assert family.spec(new).rotary.theta == 3e4


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"model_type": "mamba"}, ", ".join(sorted(FAMILIES))),
        ({"model_type": None}, ", ".join(sorted(FAMILIES))),
        ({"model_type": ["llama"]}, ", ".join(sorted(FAMILIES))),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"is_causal": False, "attention_chunk_size": 8}, "not supported: attention_chunk_size, is_causal"),
        ({"partial_rotary_factor": 0.5}, "not supported: partial_rotary_factor"),
        ({"sliding_window": 9}, "not supported: sliding_window"),
        ({"layer_types": ["sliding_attention"] * 3}, "not supported: layer_types"),
        ({"hidden_act": "mish"}, "'mish' is not supported; supported are silu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"hidden_size": "32"}, "hidden_size '32'"),
        ({"hidden_size": 32.5}, "hidden_size 32.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers True"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"head_dim": -8}, "head_dim -8"),
        ({"head_dim": 7}, "even number of dimensions, not 7"),
        ({"num_attention_heads": 3}, "3 query heads cannot share 2"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps 'tiny'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no'"),
        ({"attention_bias": 1}, "attention_bias 1"),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "'ntk' is not supported; supported are default"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "long_factor": [3]}}, "has unknown long_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate 1"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_fast must not be smaller"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "lacks long_factor, lacks short_factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor '2'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor 0"),
        ({"rope_parameters": {"rope_type": "llama3"} | LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "has unknown factor"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_parameters": 3}, "rope_parameters 3"),
        ({"rope_theta": -1}, "rope_theta -1"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["chunked"] * 3}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": [[]] * 3}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": 3}, "layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": -4}, "sliding_window -4"),
    ],
    ids=str,
)
def test_configs_that_are_refused(tmp_path, change, fragment):
    make_checkpoint(tmp_path / "x", "llama", SPEC)
    edit_config(tmp_path / "x", **change)
    refused(tmp_path / "x", fragment, kind=InputError)


def test_a_family_says_what_its_config_cannot_say():
    with pytest.raises(InputError, match="qwen2 config cannot say qkv_bias"):
        FAMILIES["qwen2"].config(SPEC)
    with pytest.raises(InputError, match="llama config cannot say o_bias"):
        FAMILIES["llama"].config(dataclasses.replace(SPEC, qkv_bias=True))


#: Layers, experts, towers or attention that the decoder has not; each is refused by name.
OTHERS = [
    "phimoe",
    "deepseek_v4",
    "qwen3_vl_moe",
    "mimo_v2_flash",
    "llava",
    "llava_next",
    "gemma3",
    "mistral3",
    "qwen2_vl",
    "qwen2_5_vl",
    "paligemma",
    "mllama",
    "llama4",
    "idefics3",
    "t5",
    "bert",
    "mamba",
]


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures_are_refused_by_name(model_type):
    with pytest.raises(InputError) as caught:
        family_of(MINIMAL | {"model_type": model_type, "text_config": MINIMAL, "num_local_experts": 8})
    assert f"model_type '{model_type}' is not supported" in str(caught.value)
    assert ", ".join(sorted(FAMILIES)) in str(caught.value)


#: Keys that transformers' shared code reads for any family, with values that change a forward pass.
SHARED = {
    "attention_chunk_size": 8,
    "is_causal": False,
    "is_encoder_decoder": True,
    "kv_sharing_modes": ["reuse"],
    "mlp_layer_types": ["sparse"],
    "per_layer_config": {"0": {"head_dim": 8}},
    "text_config": {"hidden_size": 8},
}


@pytest.mark.parametrize("name", {config["model_type"]: name for name, config in CASES.items()}.values())
@pytest.mark.parametrize("key", SHARED)
def test_every_family_refuses_what_transformers_reads_and_it_does_not(name, key):
    family = FAMILIES[CASES[name]["model_type"]]
    unread = f"type {family.model_type} has settings that are not supported: {key}"
    with pytest.raises(InputError, match=rf"{unread}|{key} \['sparse'\] does not describe 3 layers"):
        family.spec(CASES[name] | {key: SHARED[key]})


def _longrope(short: int, long: int) -> dict:
    factors = {"short_factor": [1.0] * short, "long_factor": [2.0] * long}
    return {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64} | factors}


@pytest.mark.parametrize(
    ("name", "change", "fragment"),
    [
        ("gemma-tied", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("gemma2-capped", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("gemma3_text-capped", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("gemma3_text-capped", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        ("gemma3_text-capped", {"rope_parameters": {"chunked_attention": {}}}, "has unknown chunked_attention"),
        ("gemma3_text-capped", {"layer_types": ["full_attention"] * 2}, "does not describe 3 layers"),
        ("gemma-tied", {"hidden_activation": "relu"}, "hidden_act and hidden_activation disagree"),
        ("gemma2-capped", {"layer_types": ["full_attention"] * 4}, "does not describe 3 layers"),
        ("qwen3-window", {"layer_types": ["linear_attention"] * 3}, "does not describe 3 layers"),
        ("cohere2-pattern", {"layer_types": []}, "does not describe 3 layers"),
        ("smollm3-full", {"no_rope_layers": [1, 0]}, "no_rope_layers [1, 0] does not describe 3 layers"),
        ("smollm3-full", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers [1, 0, 2]"),
        ("phi3-long", _longrope(7, 8), "7 rotary factors for 8 planes"),
        ("phi3-long", _longrope(8, 9), "9 rotary factors for 8 planes"),
        ("phi3-long", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "supported are default, longrope"),
        ("phi3-long", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'longrope' lacks long_factor"),
        ("llama-grouped", _longrope(7, 8), "7 rotary factors for 8 planes"),
        ("phi3-window", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "even number of dimensions, not 3"),
        ("gpt_neox-old", {"rotary_pct": 0.2}, "even number of dimensions, not 3"),
        ("gpt_neox-old", {"rotary_pct": 0.01}, "even number of dimensions, not 0"),
        ("stablelm-old", {"partial_rotary_factor": 0.33}, "even number of dimensions, not 5"),
        ("gpt2-plain", {"n_head": 5}, "5 heads do not divide the hidden size 48"),
        ("opt-plain", {"num_attention_heads": 5}, "5 heads do not divide the hidden size 48"),
        ("helium-plain", {"head_dim": 8}, "6 heads of 8 are not the hidden size 96"),
        ("exaone4-mixed", {"sliding_window_pattern": -1, "layer_types": None}, "-1 is not a positive whole number"),
        ("exaone4-mixed", {"sliding_window_pattern": "LLG", "layer_types": None}, "'LLG' needs layer_types beside it"),
        ("glm4_moe-grouped", {"topk_group": 5}, "3 of 12 experts cannot be chosen from 5 of 4 groups"),
        (
            "glm4_moe-grouped",
            {"topk_group": 1, "num_experts_per_tok": 4},
            "4 of 12 experts cannot be chosen",
        ),
        ("mixtral-full", {"num_experts_per_tok": 8}, "8 of 7 experts cannot be chosen"),
        ("llama-grouped", {"head_dim": 15}, "even number of dimensions, not 15"),
        ("deepseek_v3-yarn", {"num_key_value_heads": 2}, "6 heads of latent attention cannot share 2 of keys"),
        ("deepseek_v3-yarn", {"head_dim": 24}, "head_dim is not qk_rope_head_dim 8"),
        ("deepseek_v3-yarn", {"v_head_dim": 25}, "values of 25 units in heads of 24"),
        ("deepseek_v2-lite", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ("deepseek_v2-lite", {"mlp_bias": True}, "mlp_bias true is not supported"),
        ("deepseek_v32-yarn", {"layer_types": ["full_attention"] * 3}, "layer_types has other layers than"),
        ("deepseek_v32-yarn", {"q_lora_rank": None}, "q_lora_rank null is not supported"),
        ("glm_moe_dsa-shared", {"indexer_types": ["shared", "full", "full"]}, "does not describe 3 layers"),
        ("glm_moe_dsa-all", {"index_topk_pattern": "FFS"}, "index_topk_pattern is not supported"),
        ("glm4_moe_lite-leading", {"head_dim": 24}, "head_dim is not qk_rope_head_dim 8"),
    ],
    ids=str,
)
def test_refusals_of_single_families(name, change, fragment):
    with pytest.raises(InputError) as caught:
        FAMILIES[CASES[name]["model_type"]].spec(CASES[name] | change)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names", [{}, {"hidden_activation": "gelu_pytorch_tanh"}, {"hidden_activation": "gelu"}], ids=str
)
def test_gemmas_gelu_is_the_approximation(names):
    """So transformers reads the first releases."""
    config = CASES["gemma-tied"] | {"hidden_act": "gelu"} | names
    assert transformers.AutoConfig.for_model(**copy.deepcopy(config)).hidden_act == "gelu_pytorch_tanh"
    assert FAMILIES["gemma"].spec(config).activation == "gelu_tanh"


def test_texts_beyond_what_an_indexer_picks_are_refused():
    """Up to there all tokens are attended to, which the tests of parity compare; max_position_embeddings is 1024."""
    spec = FAMILIES["glm_moe_dsa"].spec(CASES["glm_moe_dsa-all"])
    assert spec.max_positions == 520 and spec.bound is not None
    prompts, options = [[1] * 500], DecodingOptions(21)
    with pytest.raises(InputError, match="sparse attention is read up to 520 tokens, where it sees all; ask for fewer"):
        generate(spec, {}, prompts, options)
    plain = FAMILIES["deepseek_v3"].spec(CASES["deepseek_v3-yarn"])
    assert plain.max_positions == 1024 and plain.bound is None
