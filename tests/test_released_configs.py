"""Configs of released checkpoints: each loads as transformers reads it, or is refused for a feature that it has.

What transformers declares and reads is a checked-in table (`known_keys.json`); it is compared with the installed
version, and what it lets pass is shown to change nothing in transformers itself.
"""

import ast
import copy
import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from tmjax import cli
from tmjax.checkpoints.hub import CONFIG_NAME, copy_companions
from tmjax.commands.doctor.examine import examine
from tmjax.errors import InputError
from tmjax.models.blocks.primitives import ACTIVATIONS
from tmjax.models.families import ALIASES, FAMILIES, family_of, unread
from tmjax.models.families.config_values import ACTIVATION_NAMES
from tmjax.models.families.quantised import is_read, without_quantisation
from tmjax.models.families.wrappers import TEXTS, TIED
from tmjax.transfer.recipe import build_recipe
from tools import config_keys
from tools.family_cases import CASES

CONFIGS = Path(__file__).parent / "data/configs"
RELEASED = sorted(CONFIGS.glob("released/*.json"))
COPIED = sorted(CONFIGS.glob("copied/*.json"))

WRAPPER = "is a multimodal wrapper, whose text model is a "
MOE, LATENT, FURTHER = "a mixture of experts", "multi-head latent attention", "layers that predict further tokens"
SPARSE, MAMBA, LINEAR = "sparse attention", "Mamba layers (a hybrid)", "linear-attention layers (a hybrid)"
#: Features that the decoder lacks, by `model_type`; each config is refused for these.
FEATURES = {
    "deepseek_ref": [MOE, SPARSE, "several residual streams", FURTHER],
    "deepseek_v4": [MOE, SPARSE, "several residual streams", FURTHER],
    "gemma4": [f"{WRAPPER}gemma4_text", "heads of another size in layers without a window"],
    "kimi_k3": [f"{WRAPPER}kimi_linear", MOE, LATENT, LINEAR, "quantised weights"],
    "llama4": [f"{WRAPPER}llama4_text", MOE, "attention in chunks"],
    "mimo_v2_flash": [MOE, "value heads of another size", "attention sinks"],
    "minimax_m3": [MOE, SPARSE, FURTHER],
    "minimax_m3_vl": ["multimodal wrapper", MOE, SPARSE, "quantised weights"],
    "nemotron-nas": ["layers of different shapes"],
    "nemotron_h": [MAMBA],
    "qwen3_5": [f"{WRAPPER}qwen3_5_text", LINEAR, FURTHER],
    "qwen3_5_moe": [f"{WRAPPER}qwen3_5_moe_text", MOE, LINEAR, FURTHER],
    "step3p7": ["gates of attention heads", MOE, FURTHER],
}
#: Configs of supported families that are refused, since their weights are packed.
PACKED = {
    "moonshotai--Kimi-K2.5": "quantised (quantization_config, compressed-tensors in config.json); dequantise it first",
    "mlx-Qwen3-0.6B-4bit": "an MLX checkpoint with 4-bit weights); write it unpacked with mlx_lm.convert --dequantize",
}


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def family(config: dict) -> str:
    return ALIASES.get(config["model_type"], config["model_type"])


def named(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


@pytest.fixture(scope="module")
def bare(tmp_path_factory, llama_dir):
    """Makes a directory with a config, a tokenizer and nothing else."""

    def make(config: dict) -> Path:
        directory = tmp_path_factory.mktemp("bare")
        (directory / CONFIG_NAME).write_text(json.dumps(config))
        copy_companions(llama_dir, directory)
        return directory

    return make


def doctor(directory: Path, other: Path) -> dict:
    recipe = build_recipe({"source": str(directory), "target": str(other), "texts": "-", "out": "-"})
    return examine(recipe, texts=False)


@pytest.mark.parametrize("file", RELEASED + COPIED, ids=named)
def test_it_loads_or_is_refused_for_a_feature_that_it_has(file, bare, qwen2_dir):
    config = read(file)
    report = doctor(bare(config), qwen2_dir)
    about = [problem for problem in report["problems"] if problem.startswith("source")]
    if file.stem in PACKED:
        assert PACKED[file.stem] in about[0]
    elif family(config) in FAMILIES:
        assert not about and report["models"]["source"]["family"] == family(config)
        return
    elif config["model_type"] in TIED:
        text, _ = TEXTS[config["text_config"]["model_type"]]
        assert not about and report["models"]["source"]["family"] == text
        return
    else:
        for feature in FEATURES[config["model_type"]]:
            assert feature in about[0]
    assert len(about) == 1 and "\n" not in about[0]
    assert report["models"]["source"] is None
    # Weights in float8, MXFP4 and NVFP4 are read, and are no reason.
    settings = config.get("quantization_config")
    packed = isinstance(settings, dict) and not is_read(settings)
    assert ("quantised" in about[0]) == (packed or "quantization_config" in str(config.get("text_config")))
    # Whoever could not use the weights in any case is not told to unpack them.
    assert bool(re.search("dequanti[sz]e", about[0])) == (file.stem in PACKED)


def test_most_of_the_copied_configs_load():
    """Those of supported families, whose weights are read; docs/families.md says how many."""
    loaded = [f for f in COPIED if family(read(f)) in FAMILIES or read(f)["model_type"] in TIED]
    assert len({file.stem for file in loaded} - PACKED.keys()) == 50


def test_nearly_all_of_the_supported_families_load():
    refused = [file.stem for file in RELEASED if file.stem in PACKED]
    assert len(RELEASED) == 41 and len(COPIED) == 86
    assert refused == ["mlx-Qwen3-0.6B-4bit"]
    assert all(read(file)["model_type"] in FAMILIES for file in RELEASED)


LOADED = [file for file in RELEASED + COPIED if family(read(file)) in FAMILIES and file.stem not in PACKED]


@pytest.mark.parametrize("file", LOADED, ids=named)
def test_it_is_read_as_transformers_reads_it(file):
    config = read(file)
    config |= {"model_type": family(config)}  # transformers knows no other names
    if is_read(config.get("quantization_config")):
        config = without_quantisation(config)
    if config["model_type"] == "gpt_neox":  # transformers 5 does not take null there
        config = {key: value for key, value in config.items() if value is not None}
    if file.stem == "Phi-3-mini-128k-su":
        # transformers 5 renames `su` to `longrope` after it has looked for the original length of a longrope.
        with pytest.raises(KeyError, match="original_max_position_embeddings"):
            transformers.AutoConfig.for_model(**copy.deepcopy(config))
        renamed = copy.deepcopy(config)
        renamed["rope_scaling"]["type"] = "longrope"
        theirs = transformers.AutoConfig.for_model(**renamed).to_dict()
    else:
        theirs = transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
    assert family_of(config).spec(theirs) == family_of(config).spec(config)


#: Settings that were seen in released checkpoints and change nothing: family, settings, what the note says.
IDLE = [
    ("gemma2", {"cache_implementation": "hybrid", "sliding_window_size": 4096}, "cache_implementation, sliding_window"),
    ("gemma3_text", {"cache_implementation": "hybrid", "sliding_window_size": 512}, "sliding_window_size"),
    ("phi3", {"attention_bias": False, "lm_head_bias": False, "mlp_bias": False}, "attention_bias, lm_head_bias, mlp"),
    ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}, "auto_map names code"),
    ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1}, "full_attn_mod sets which layers"),
    ("phi3", {"interpolate_factor": 1}, "interpolate_factor stretches positions"),
    (
        "cohere",
        {"model_max_length": 131072, "n_embd": 8, "ff_dim": 9, "activation": "relu"},
        "model_max_length, n_embd",
    ),
    (
        "starcoder2",
        {
            "activation_function": "relu",
            "attention_softmax_in_fp32": True,
            "layer_norm_epsilon": 0.5,
            "mlp_type": "gated",
            "norm_type": "rms_norm",
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": False,
        },
        "activation_function, attention_softmax_in_fp32, layer_norm_epsilon",
    ),
    ("smollm3", {"max_window_layers": 1}, "max_window_layers"),
    ("gpt2", {"n_special": 3, "predict_special_tokens": True, "_num_labels": 1}, "n_special, predict_special_tokens"),
    ("mistral", {"_flash_attn_2_enabled": True}, "_flash_attn_2_enabled"),
    (
        "llama",
        {"internal_version": "3.1", "max_length": 4096, "pruned_heads": {"0": [1]}},
        "internal_version, max_leng",
    ),
    (
        "llama",
        {
            "bad_words_ids": [[1]],
            "cross_attention_hidden_size": 7,
            "length_penalty": 2.0,
            "temperature": 0.1,
            "tf_legacy_loss": True,
            "tie_encoder_decoder": True,
            "top_k": 3,
            "torchscript": True,
            "use_bfloat16": True,
        },
        "bad_words_ids, cross_attention_hidden_size, length_penalty",
    ),
    ("llama", {"rope_interleaved": True}, "rope_interleaved says that neighbouring"),
    (
        "llama",
        {"num_local_experts": 8, "sparse_step": 2, "attn_scale": 3.0},
        "attn_scale, num_local_experts, sparse_st",
    ),
    ("qwen2", {"use_mrope": True}, "use_mrope asks for rotary positions of several axes; transformers ignores it"),
    (
        "qwen2",
        {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 4, "original_max_position_embeddings": 16}},
        "dual_chunk_attention_config asks for attention in chunks over very long contexts; transformers ignores it",
    ),
    ("gpt_neox", {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}, "hidden_dropout_prob"),
]


def logits(config: dict) -> torch.Tensor:
    torch.manual_seed(1)
    made = transformers.AutoConfig.for_model(**copy.deepcopy(config))
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.arange(40)[None] % config["vocab_size"], use_cache=False).logits


@pytest.mark.parametrize(("model_type", "settings", "note"), IDLE, ids=lambda value: str(value)[:60])
def test_a_setting_that_transformers_does_not_read_is_a_note(model_type, settings, note):
    name = next(name for name in CASES if CASES[name]["model_type"] == model_type)
    family, plain = FAMILIES[model_type], CASES[name]
    spec, notes = family.read_config(plain | settings)
    assert spec == family.spec(plain)
    assert any(note in line for line in notes), notes
    assert all(any(key in line for line in notes) for key in settings)
    assert family.read_config(plain)[1] == ()
    torch.testing.assert_close(logits(plain | settings), logits(plain), rtol=0, atol=0)


def test_a_setting_that_transformers_reads_changes_what_it_computes():
    """The other half: what is refused is not refused in vain."""
    for name, settings in (
        ("llama-grouped", {"is_causal": False}),
        ("llama-linear", {"partial_rotary_factor": 0.0625}),
        ("gpt2-plain", {"num_hidden_layers": 2}),
    ):
        assert_changed(CASES[name], settings)
        with pytest.raises(InputError, match=next(iter(settings))):
            family_of(CASES[name]).spec(CASES[name] | settings)


def assert_changed(plain: dict, settings: dict) -> None:
    try:
        found = logits(plain | settings)
    except RuntimeError:  # shapes that no longer fit
        return
    assert not torch.equal(found, logits(plain))


def test_settings_said_twice_and_settings_that_are_off():
    gpt2 = CASES["gpt2-plain"]
    again = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 8}
    off = {"is_causal": True, "add_cross_attention": False, "is_encoder_decoder": False}
    assert FAMILIES["gpt2"].read_config(gpt2 | again | off) == FAMILIES["gpt2"].read_config(gpt2)
    # transformers takes these for other names of n_embd and the like, and the last one read wins.
    for key, value in again.items():
        with pytest.raises(InputError, match=f"not supported: {key}"):
            FAMILIES["gpt2"].spec(gpt2 | {key: 2 * value})
    llama = CASES["llama-grouped"] | {"layer_types": ["full_attention"] * 3, "partial_rotary_factor": 1.0}
    assert FAMILIES["llama"].read_config(llama) == FAMILIES["llama"].read_config(CASES["llama-grouped"])


def test_a_factor_that_only_others_read():
    family, plain = FAMILIES["llama"], copy.deepcopy(CASES["llama-yarn"])
    spec, notes = family.read_config(CASES["llama-yarn"])
    assert plain["rope_parameters"].pop("attn_factor") == 0.5
    assert family.read_config(plain) == (spec, ())
    torch.testing.assert_close(logits(plain), logits(CASES["llama-yarn"]), rtol=0, atol=0)
    assert "attn_factor (vLLM multiplies the attention factor by attn_factor" in notes[0]
    plain["rope_parameters"] |= {"gamma": 3, "finetuned": True}
    assert "in a rope scaling 'yarn' either: finetuned, gamma" in family.read_config(plain)[1][0]


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_older_names_of_longrope(kind):
    """Of transformers' Phi 3, which means LongRoPE by all three."""
    config = copy.deepcopy(CASES["phi3-old-long"])
    config["rope_scaling"]["type"] = kind
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
    assert theirs["rope_parameters"]["rope_type"] == "longrope"
    assert FAMILIES["phi3"].spec(config) == FAMILIES["phi3"].spec(theirs)


def test_the_original_length_that_phi3_means_without_one():
    """Its class has a default, which wins over what the scaling says."""
    config = copy.deepcopy(CASES["phi3-old-long"])
    del config["original_max_position_embeddings"]
    config["max_position_embeddings"] = 16384
    config["rope_scaling"]["type"] = "longrope"
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
    spec = FAMILIES["phi3"].spec(config)
    assert spec == FAMILIES["phi3"].spec(theirs)
    assert (spec.rotary.original_positions, spec.rotary.factor) == (4096, 4.0)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activations_by_every_name(name):
    x = np.linspace(-6, 6, 10001, dtype=np.float32)
    theirs = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[ACTIVATION_NAMES[name]](x), theirs, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_of_another_class_is_noted():
    config = CASES["llama-grouped"] | {"architectures": ["LlamaModel"]}
    assert FAMILIES["llama"].read_config(config)[1] == (
        "config.json: the checkpoint is of LlamaModel; it is read as LlamaForCausalLM",
    )


def test_the_table_is_what_the_installed_transformers_gives():
    held, made = unread.known_keys(), config_keys.table()
    if made["transformers"] == held["transformers"]:
        assert held == made
        return
    # Another version: whatever it reads beyond the table could be a setting that is only noted.
    beyond = {"shared": set(made["shared"]) - set(held["shared"])}
    for name, keys in made["families"].items():
        known = {*held["shared"], *held["families"][name]["read"], *held["families"][name]["declared"]}
        beyond[name] = set(keys["read"]) - known
    beyond = {name: keys for name, keys in beyond.items() if keys}
    assert not beyond, f"of transformers {metadata.version('transformers')}: run python -m tools.config_keys"


def test_a_table_that_has_gone_stale_is_found(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "known_keys.json"
    monkeypatch.setattr(config_keys, "KNOWN_KEYS", stale)
    assert config_keys.main([]) == 0
    assert config_keys.main(["--check"]) == 0
    stale.write_text(re.sub(r'\n *"mlp_bias",?', "", stale.read_text(), count=1))
    assert config_keys.main(["--check"]) == 2
    assert "run python -m tools.config_keys" in capsys.readouterr().err


def test_a_family_that_is_not_in_the_table_refuses_every_key_that_it_does_not_take():
    assert unread.sort_unread("mine", {"torchscript": True, "use_cache": True}, {}) == (["torchscript"], [])
    assert unread.sort_unread("llama", {"torchscript": True, "use_cache": True}, {})[0] == []


def test_keys_that_source_text_reads():
    source = """
class Made:
    def __post_init__(self, **kwargs):
        self.a = kwargs.pop("b", 1) + kwargs.get("c") + kwargs["d"] + self.e
    def other(self, **kwargs):
        kwargs.pop("f")
def run(config, self):
    config.g(1)
    return config.h + self.config.i + getattr(config, "j", 0) + config.get_text_config().k + other.l
"""
    tree = ast.parse(source)
    assert set(config_keys.keys_read(tree)) == {"h", "i", "j", "k", "config"} - {"config"}
    assert set(config_keys.keys_read(tree, own=True)) >= {"b", "c", "d", "e", "h", "i", "j", "k"}
    assert "f" not in set(config_keys.keys_read(tree, own=True))
    assert [node.name for node in config_keys.reachable(ast.parse("def a(): b()\ndef b(): 1\ndef c(): 1"), "a")] == [
        "a",
        "b",
    ]


#: Configs of architectures in short, and the feature that the refusal names.
OTHERS = [
    ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder and a decoder"),
    ({"model_type": "bert"}, "an encoder, which predicts no next token"),
    ({"model_type": "mamba", "state_size": 16}, "Mamba layers"),
    ({"model_type": "rwkv"}, "recurrent layers"),
    ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, "a mixture of experts (moe_num_experts 16)"),
    ({"model_type": "jamba", "mamba_d_state": 16, "num_experts": 16}, "a mixture of experts (num_experts 16), Mamba"),
    ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "layers of the kind conv"),
    ({"model_type": "gemma3n_text", "hidden_size_per_layer_input": 256}, "embeddings of every layer's own"),
    ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "once its text model is saved by itself"),
    ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "whose text model is a gemma3_text"),
    ({"model_type": "x", "vision_config": {"depth": 2}}, "is a multimodal wrapper"),
    ({"model_type": "x", "num_experts": "many", "layer_types": 3, "kv_lora_rank": [1]}, "'x' is not supported; supp"),
    ({"model_type": None}, "model_type None is not supported; supported are arcee"),
    ({}, "model_type None is not supported; supported are arcee"),
]


@pytest.mark.parametrize(("config", "feature"), OTHERS, ids=str)
def test_other_architectures_are_refused_for_what_they_have(config, feature):
    with pytest.raises(InputError) as caught:
        family_of(config)
    assert feature in str(caught.value)
    assert ", ".join(sorted(FAMILIES)) in str(caught.value)


def test_notes_are_in_the_doctors_tables(bare, qwen2_dir, capsys):
    directory = bare(read(CONFIGS / "released/gemma-2-2b.json"))
    arguments = ["doctor", "--source", str(directory), "--target", str(qwen2_dir)]
    assert cli.run([*arguments, "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any(note.startswith("source: config.json: without effect") and "cache_impl" in note for note in notes)
    assert cli.run(arguments) == 0
    assert "Note: source: config.json: without effect" in " ".join(capsys.readouterr().out.split())
