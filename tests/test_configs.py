"""The config tables: both ways, against transformers' reading, and every config that is refused."""

import dataclasses
import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import transformers
from helpers import SPEC, edit_config, refused
from hypothesis import given, settings

from tmjax.errors import InputError
from tmjax.models.families import FAMILIES, family_of
from tmjax.models.spec import FULL_ATTENTION, DecoderSpec, Rotary
from tools.make_checkpoint import make_checkpoint

rotaries = st.one_of(
    st.builds(Rotary, theta=st.floats(10, 1e7)),
    st.builds(Rotary, theta=st.floats(10, 1e7), scaling=st.just("linear"), factor=st.floats(1, 64)),
    st.builds(
        Rotary,
        theta=st.floats(10, 1e7),
        scaling=st.just("llama3"),
        factor=st.floats(1, 64),
        low_freq_factor=st.floats(0.5, 2),
        high_freq_factor=st.floats(2.5, 8),
        original_positions=st.integers(16, 10**5),
    ),
)


@st.composite
def specs(draw, model_type: str) -> DecoderSpec:
    kv_heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    heads, bias = kv_heads * draw(st.integers(1, 4)), draw(st.booleans())
    sizes = st.lists(st.sampled_from([draw(st.integers(1, 10**6)), FULL_ATTENTION]), min_size=layers, max_size=layers)
    windows = draw(sizes.filter(lambda w: min(w) < FULL_ATTENTION) | st.just(()))
    own = {
        "llama": {"qkv_bias": bias, "o_bias": bias, "mlp_bias": draw(st.booleans())},
        "qwen2": {"qkv_bias": True, "windows": tuple(windows)},
    }[model_type]
    return DecoderSpec(
        vocab=draw(st.integers(1, 10**6)),
        hidden=heads * draw(st.integers(1, 100)),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        mlp=draw(st.integers(1, 10**5)),
        max_positions=draw(st.integers(1, 10**6)),
        norm_eps=draw(st.floats(1e-8, 1e-2)),
        rotary=draw(rotaries),
        activation=draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
        tied_embeddings=draw(st.booleans()),
        **own,
    )


def read_by_transformers(directory: Path, model_type: str) -> DecoderSpec:
    """The spec that transformers' reading of a config amounts to, field by field."""
    config = transformers.AutoConfig.from_pretrained(directory)
    assert config.model_type == model_type
    rope = dict(config.rope_parameters)
    names = {"rope_theta": "theta", "rope_type": "scaling", "original_max_position_embeddings": "original_positions"}
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


@settings(max_examples=30)
@given(st.sampled_from(sorted(FAMILIES)).flatmap(lambda kind: st.tuples(st.just(kind), specs(kind))))
def test_config_both_ways(tmp_path_factory, drawn):
    model_type, spec = drawn
    config = FAMILIES[model_type].config(spec)
    assert family_of(config) is FAMILIES[model_type]
    assert FAMILIES[model_type].spec(config) == spec
    directory = tmp_path_factory.mktemp("config")
    (directory / "config.json").write_text(json.dumps(config))
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
    for family in FAMILIES.values():
        assert family.spec(new) == family.spec(old) == family.spec(older)
        assert family.spec(new).rotary.theta == 3e4


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"model_type": "mamba"}, "supported are llama, qwen2"),
        ({"model_type": None}, "supported are llama, qwen2"),
        ({"model_type": ["llama"]}, "supported are llama, qwen2"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"attn_scale": 2.0, "qk_norm": True}, "attn_scale, qk_norm"),
        ({"use_mrope": True}, "use_mrope"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"hidden_act": "mish"}, "'mish' is not supported; supported are silu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"hidden_size": "32"}, "hidden_size '32'"),
        ({"hidden_size": 32.5}, "hidden_size 32.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers True"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"head_dim": -8}, "head_dim -8"),
        ({"head_dim": 7}, "even head size"),
        ({"num_attention_heads": 3}, "3 query heads cannot share 2"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps 'tiny'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no'"),
        ({"attention_bias": 1}, "attention_bias 1"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported; supported are default"),
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
