"""Names of tensors as checkpoints have them: base models, wrappers' prefixes; loaded alike, exported under one name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from helpers import edit_config, edit_tensors, refused, stored

from tmjax import cli
from tmjax.checkpoints import hf, orbax
from tmjax.checkpoints.formats.safetensors import SINGLE_NAME
from tmjax.checkpoints.load import checkpoint_notes, load_model
from tmjax.commands.convert import convert
from tmjax.errors import InputError
from tools.family_cases import CASES, make_reference

transformers.utils.logging.disable_progress_bar()
#: A case of each family whose head is tied, or is made so.
TIED = ("gpt2-plain", "llama-tied", "qwen2-tied", "gemma2-capped", "starcoder2-no_bias", "stablelm-parallel")
UNTIED = ("llama-grouped", "gpt_neox-parallel", "phi3-window")


@pytest.fixture(scope="module", params=TIED)
def saved(request, tmp_path_factory) -> tuple[Path, Path]:
    """A language model, and its base model saved by itself as transformers does it."""
    whole, base = (tmp_path_factory.mktemp(f"{request.param}-{kind}") for kind in ("whole", "base"))
    reference = make_reference(request.param, whole).float()
    reference.base_model.save_pretrained(base)
    return whole, base


def same(one, other) -> bool:
    return one.spec == other.spec and all(np.array_equal(one.params[path], other.params[path]) for path in one.params)


def as_bin(directory: Path) -> None:
    """Turns the safetensors of a directory into PyTorch's format."""
    torch.save(safetensors.torch.load_file(directory / SINGLE_NAME), directory / "pytorch_model.bin")
    (directory / SINGLE_NAME).unlink()


def renamed(directory: Path, rename) -> None:
    edit_tensors(directory, lambda held: [held.update({rename(name): held.pop(name)}) for name in list(held)])


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_base_model_loads_as_the_language_model(saved, tmp_path, form):
    whole, base = saved
    shutil.copytree(base, tmp_path / "base")
    if form == "bin":
        as_bin(tmp_path / "base")
    ours, plain = load_model(tmp_path / "base"), load_model(whole)
    assert same(ours, plain)
    assert plain.notes == ()
    assert any(note.startswith("names of tensors: ") for note in ours.notes)
    assert any("it is read as" in note for note in ours.notes)
    assert checkpoint_notes(tmp_path / "base") == ours.notes
    # Export writes the names of the table, whichever way it goes: in memory, streamed, through orbax.
    names = stored(whole).keys()
    hf.export(ours, tmp_path / "exported")
    assert convert(str(tmp_path / "base"), tmp_path / "streamed", to="hf").notes == ours.notes
    convert(str(tmp_path / "base"), tmp_path / "orbax", to="orbax")
    convert(str(tmp_path / "orbax"), tmp_path / "back", to="hf")
    for name in ("exported", "streamed", "back"):
        held = stored(tmp_path / name)
        assert held.keys() == names
        assert load_model(tmp_path / name).notes == tuple(n for n in ours.notes if not n.startswith("names"))
    assert same(orbax.load(tmp_path / "orbax"), plain)


def test_transformers_reads_the_base_model_so_too(saved):
    whole, base = saved
    ids = torch.arange(20)[None]
    both = [transformers.AutoModelForCausalLM.from_pretrained(directory).eval() for directory in (whole, base)]
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in both))


@pytest.mark.parametrize("name", UNTIED)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_base_model_without_the_head_that_it_needs(name, tmp_path, form, capsys, qwen2_dir):
    """transformers would give it a random one, with a warning."""
    make_reference(name, tmp_path / "whole").float().base_model.save_pretrained(tmp_path / "base")
    if form == "bin":
        as_bin(tmp_path / "base")
    refused(tmp_path / "base", "holds a base model: it lacks the output head", "tie to the embeddings")
    assert cli.run(["convert", str(tmp_path / "base"), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert cli.run(["doctor", "--source", str(tmp_path / "base"), "--target", str(qwen2_dir), "--json"]) == 2
    assert any("holds a base model" in problem for problem in json.loads(capsys.readouterr().out)["problems"])


WRAPPERS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of a compiled model": lambda name: f"module._orig_mod.{name}",
    "a compiled block": lambda name: name.replace(".mlp.", "._orig_mod.mlp.").replace(".h.0.", ".h.0._orig_mod."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('.mlp.', '._checkpoint_wrapped_module.mlp.')}",
    "a training framework": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prefixes_of_wrappers(wrapper, form, llama_dir, tmp_path, capsys):
    shutil.copytree(llama_dir, tmp_path / "x")
    renamed(tmp_path / "x", WRAPPERS[wrapper])
    if form == "bin":
        as_bin(tmp_path / "x")
    model = load_model(tmp_path / "x")
    assert same(model, load_model(llama_dir))
    assert len(model.notes) == 1 and " is read as model." in model.notes[0]
    assert cli.run(["convert", str(tmp_path / "x"), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert "Note: names of tensors: " in capsys.readouterr().out
    assert stored(tmp_path / "out").keys() == stored(llama_dir).keys()


def test_prefix_of_a_wrapped_base_model(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "x")
    renamed(tmp_path / "x", lambda name: f"module.{name.removeprefix('model.')}")
    assert same(load_model(tmp_path / "x"), load_model(llama_dir))


def test_two_names_for_one_tensor(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "x")
    edit_tensors(tmp_path / "x", lambda held: held.update({"_orig_mod.model.norm.weight": held["model.norm.weight"]}))
    refused(tmp_path / "x", "_orig_mod.model.norm.weight", "are both model.norm.weight")


def test_a_prefix_on_some_names_only(llama_dir, tmp_path):
    """Half a base model is no base model: the differences are listed."""
    shutil.copytree(llama_dir, tmp_path / "x")
    renamed(tmp_path / "x", lambda name: name.removeprefix("model.") if "layers.0" in name else name)
    refused(tmp_path / "x", "missing tensor model.layers.0", "unexpected tensor layers.0")


def test_what_is_wrong_beside_the_prefix_is_said_in_the_tables_names(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "x")
    renamed(tmp_path / "x", lambda name: name.removeprefix("model."))
    edit_tensors(tmp_path / "x", lambda held: (held.pop("norm.weight"), held.update(other=np.ones(3, np.float32))))
    refused(tmp_path / "x", "missing tensor model.norm.weight", "unexpected tensor model.other")
    shutil.copytree(llama_dir, tmp_path / "y")
    edit_config(tmp_path / "y", hidden_size=64)
    renamed(tmp_path / "y", lambda name: f"module.{name}")
    refused(tmp_path / "y", "model.embed_tokens.weight has shape [")


def test_gpt2_as_it_is_on_the_hub(tmp_path):
    """No prefix, and the causal mask as a buffer of every layer."""
    make_reference("gpt2-plain", tmp_path / "x")
    plain = load_model(tmp_path / "x")
    renamed(tmp_path / "x", lambda name: name.removeprefix("transformer."))
    mask = {f"h.{layer}.attn.bias": np.tril(np.ones((1, 1, 600, 600), np.float32)) for layer in range(3)}
    edit_tensors(tmp_path / "x", lambda held: held.update(mask))
    model = load_model(tmp_path / "x")
    assert same(model, plain)
    assert "wte.weight is read as transformer.wte.weight" in model.notes[0] or "read as transformer." in model.notes[0]


def test_notes_are_in_the_manifest(tmp_path, small_flags, texts, recipe_file, capsys):
    for name, directory in (("source", small_flags[1]), ("target", small_flags[3])):
        shutil.copytree(directory, tmp_path / name)
        edit_config(tmp_path / name, cache_implementation="hybrid")
    renamed(tmp_path / "source", lambda name: f"_orig_mod.{name}")
    pair = ("--source", str(tmp_path / "source"), "--target", str(tmp_path / "target"))
    run = tmp_path / "run"
    code = cli.run(
        ["align", str(recipe_file), *pair, "--texts", str(texts["calibration"]), "--alpha", "0", "--out", str(run)]
    )
    error = capsys.readouterr().err
    assert code == 0, error
    assert error.count("tmjax: warning: source: ") == 2 and error.count("tmjax: warning: target: ") == 1
    notes = json.loads((run / "manifest.json").read_text())["notes"]
    assert set(notes) == {"source", "target"}
    assert "cache_implementation" in notes["source"][0] and "_orig_mod." in notes["source"][1]
    assert len(notes["target"]) == 1 and "cache_implementation" in notes["target"][0]


def test_notes_of_a_checkpoint_that_is_evaluated(tmp_path, llama_dir, capsys):
    shutil.copytree(llama_dir, tmp_path / "x")
    renamed(tmp_path / "x", lambda name: f"module.{name}")
    (tmp_path / "texts.txt").write_text("Habari ya asubuhi.\n")
    arguments = ["evaluate", str(tmp_path / "x"), str(llama_dir), "--texts", str(tmp_path / "texts.txt")]
    assert cli.run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["notes"].keys() == {str(tmp_path / "x")}
    assert result["evaluation"][str(tmp_path / "x")] == result["evaluation"][str(llama_dir)]
    assert cli.run(arguments) == 0
    assert "names of tensors: module." in capsys.readouterr().out


def test_an_error_names_the_directory(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "x")
    edit_config(tmp_path / "x", is_causal=False)
    with pytest.raises(InputError, match=rf"^{tmp_path / 'x'}: config\.json of type llama has settings"):
        load_model(tmp_path / "x")


def test_the_cases_are_tied_or_not():
    assert all(CASES[name].get("tie_word_embeddings", name.startswith("gpt2")) for name in TIED)
    assert not any(CASES[name]["tie_word_embeddings"] for name in UNTIED)
