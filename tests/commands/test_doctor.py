"""`tmjax doctor`: what it says of a pair is what loading, aligning and storing it finds; it reads no weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import SPEC, edit_config

from tmjax import cli
from tmjax.align.features import FeatureSite
from tmjax.align.plans import _form
from tmjax.checkpoints import orbax
from tmjax.checkpoints.formats.safetensors import SINGLE_NAME
from tmjax.checkpoints.hub import CONFIG_NAME, copy_companions
from tmjax.checkpoints.load import load_model
from tmjax.commands.doctor.examine import examine
from tmjax.errors import NonFiniteError
from tmjax.models.families import FAMILIES
from tmjax.models.spec import Alibi, Rotary
from tmjax.ot import make_solver
from tmjax.transfer.recipe import build_recipe

KEYS = {
    "mergeable",
    "problems",
    "operators",
    "notes",
    "models",
    "projections",
    "differences",
    "tokenizers",
    "rows",
    "memory",
    "time",
}


def bare(directory: Path, family: str, spec, tokenizer: Path) -> Path:
    """A checkpoint without weights."""
    directory.mkdir()
    values = dataclasses.replace(spec, **FAMILIES[family].fixed)
    (directory / CONFIG_NAME).write_text(json.dumps(FAMILIES[family].config(values) | {"dtype": "bfloat16"}))
    copy_companions(tokenizer, directory)
    return directory


def doctor(capsys, *arguments: object) -> tuple[int, dict, str]:
    code = cli.run(["doctor", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.fixture
def pair(tmp_path, llama_dir, qwen2_dir) -> tuple[Path, Path]:
    """The bundled source and target without their weights."""
    found = []
    for name, directory in (("source", llama_dir), ("target", qwen2_dir)):
        (tmp_path / name).mkdir()
        shutil.copy(directory / CONFIG_NAME, tmp_path / name)
        copy_companions(directory, tmp_path / name)
        found.append(tmp_path / name)
    return found[0], found[1]


def test_the_bundled_pair(capsys, llama_dir, qwen2_dir, texts, recipe_file, plain):
    arguments = (recipe_file, "--source", llama_dir, "--target", qwen2_dir, "--texts", texts["calibration"])
    code, report, _ = doctor(capsys, *arguments)
    assert code == 0
    assert set(report) == KEYS
    assert report["mergeable"]
    assert report["problems"] == report["notes"] == []
    for name, directory in (("source", llama_dir), ("target", qwen2_dir)):
        model = load_model(directory)
        assert report["models"][name]["parameters"] == model.size
        assert report["models"][name]["bytes"] == sum(value.nbytes for value in model.params.values())
    assert [p["role"] for p in report["projections"]["mapped"]] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert report["projections"]["mapped"][4]["target_shape"] == [384, 128]
    manifest = json.loads((plain / "manifest.json").read_text())
    assert report["rows"]["rows"] == manifest["rows"]["rows"]
    on_disk = sum(file.stat().st_size for file in (plain / "activations").rglob("*.npy"))
    assert report["memory"]["stages"]["activations (on disk)"] == pytest.approx(on_disk, rel=0.01)
    stored = (plain / "alignment/alignment.safetensors").stat().st_size
    assert report["memory"]["stages"]["alignment (on disk)"] == pytest.approx(stored, rel=0.15)
    peak = manifest["stages"]["alignment"]["peak_rss_mib"]  # of this whole test process so far: an upper bound
    assert report["memory"]["peak"] / 2**20 < 2 * peak
    assert report["time"]["estimate"] is True
    assert len(report["time"]["devices"]) == 2


def test_no_weights_are_needed_or_read(capsys, pair, llama_dir, qwen2_dir):
    code, report, _ = doctor(capsys, "--source", pair[0], "--target", pair[1])
    assert code == 0
    assert [note.split()[0] for note in report["notes"]] == ["target", "source"]
    assert report["rows"]["assumed"]
    for directory, weights in zip(pair, (llama_dir, qwen2_dir), strict=True):
        size = int.from_bytes((weights / SINGLE_NAME).read_bytes()[:8], "little") + 8
        raw = (weights / SINGLE_NAME).read_bytes()
        (directory / SINGLE_NAME).write_bytes(raw[:size] + b"\xff" * (len(raw) - size))
        with pytest.raises(NonFiniteError):
            load_model(directory)
    code, again, _ = doctor(capsys, "--source", pair[0], "--target", pair[1])
    assert code == 0
    assert again["notes"] == []
    assert again["memory"] == report["memory"]


@pytest.mark.parametrize("layers", [2, 12])
def test_the_form_that_is_announced_is_the_one_that_is_kept(pair, layers):
    edit_config(pair[0], num_hidden_layers=layers)
    recipe = build_recipe({"source": str(pair[0]), "target": str(pair[1]), "texts": "-", "out": "-"})
    report = examine(recipe, texts=False)
    forms = set()
    for item in report["memory"]["sites"].values():
        n, k = item["units"]
        site = FeatureSite(np.zeros((4, 10_000, n), bool), np.zeros((layers, 10_000, k), bool))
        form = _form(site, make_solver("scaling"), item["pairs"], None)
        assert item["kept_as"].startswith(form)
        assert item["pairs"] == layers * 4
        forms.add(form)
    assert forms


def test_a_plain_mlp_against_a_gated_one(capsys, tmp_path, pair):
    spec = dataclasses.replace(SPEC, vocab=5000, hidden=32, heads=4, kv_heads=4, mlp=128, rotary=Rotary(scaling="none"))
    plain = bare(tmp_path / "gpt2", "gpt2", spec, pair[0])
    code, report, _ = doctor(capsys, "--source", pair[0], "--target", plain)
    assert code == 0
    assert {"role": "gate", "reason": "the target has none"} in report["projections"]["left_out"]
    assert [p["role"] for p in report["projections"]["mapped"]] == ["q", "k", "v", "o", "up", "down"]
    different = {item["what"]: item for item in report["differences"] if not item["same"]}
    assert different["rotary"]["target"] == "none"
    assert different["learned positions"]["target"] == "yes"
    assert different["MLP"]["target"].startswith("plain")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("operators: [{transport: {roles: [gate]}}]\n")
    code, report, error = doctor(capsys, recipe, "--source", pair[0], "--target", plain)
    assert code == 2
    assert "gate" in error


def test_biases_by_distance_and_sinks(capsys, tmp_path, pair):
    spec = dataclasses.replace(SPEC, vocab=5000, hidden=32, heads=4, kv_heads=4, mlp=128, rotary=Rotary(scaling="none"))
    bloom = bare(tmp_path / "bloom", "bloom", dataclasses.replace(spec, alibi=Alibi(), embedding_norm=True), pair[0])
    code, report, _ = doctor(capsys, "--source", pair[0], "--target", bloom)
    held = {item["what"]: item for item in report["differences"]}
    assert code == 0 and held["biases by distance (ALiBi)"]["target"] == "slopes 0.0039 to 0.25"
    assert held["norm of embeddings"]["target"] == "yes" and held["attention sinks"]["same"]
    assert any("biases of scores by distance (ALiBi) are no weights" in note for note in report["notes"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("alignment: {structure: heads}\n")
    _, report, _ = doctor(capsys, recipe, "--source", pair[0], "--target", bloom)
    assert any("of the source turn with their position, those of the target do not" in n for n in report["notes"])


def test_windows_scaling_and_norms_of_heads(capsys, tmp_path, pair):
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit_config(pair[0], rope_theta=..., rope_parameters=llama3 | {"original_max_position_embeddings": 8192})
    rotary = {"rotary": Rotary(theta=1e6), "local_rotary": Rotary(), "layer_rotary": (1, 0, 1)}
    spec = dataclasses.replace(SPEC, vocab=5000, windows=(16, 10**9, 16), **rotary)
    spec = dataclasses.replace(spec, embedding_scale=spec.hidden**0.5, activation="gelu_tanh", attention_scale=0.5)
    target = bare(tmp_path / "gemma", "gemma3_text", dataclasses.replace(spec, tied_embeddings=True), pair[0])
    _, report, _ = doctor(capsys, "--source", pair[0], "--target", target)
    held = {item["what"]: item for item in report["differences"]}
    assert held["rotary"]["source"] == "theta 500000, llama3 x 8, 32 of 32 dimensions"
    assert held["windows"] == {"what": "windows", "target": "2 of 3 layers, 16 tokens", "source": "none", "same": False}
    assert held["qk norm"]["target"] == "head"
    assert held["layers of the second rotary"]["target"] == "2"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "does not exist"),
        (lambda d: edit_config(d, model_type="mamba"), "model_type 'mamba' is not supported"),
        (
            lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}),
            "quantised (quantization_config, gptq",
        ),
        (lambda d: edit_config(d, hidden_size=...), "lacks hidden_size"),
        (lambda d: (d / CONFIG_NAME).rename(d / "model-q4.gguf"), "is a GGUF file"),
        (lambda d: (d / CONFIG_NAME).write_text("{"), "not readable JSON"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer"),
        (lambda d: edit_config(d, vocab_size=100), "the embedding 100 rows"),
    ],
)
@pytest.mark.parametrize("which", [0, 1], ids=["source", "target"])
def test_what_stands_in_the_way(capsys, pair, damage, message, which):
    damage(pair[which])
    code, report, error = doctor(capsys, "--source", pair[0], "--target", pair[1])
    assert code == 2
    assert set(report) == KEYS
    assert not report["mergeable"]
    assert any(message in problem for problem in report["problems"])
    assert error.startswith("tmjax: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert cli.run(["doctor", "--source", str(pair[0]), "--target", str(pair[1])]) == 2
    assert "cannot be merged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("alignment: {solver: permutation}", "equal sizes"),
        ("alignment: {solver: nothing}", "nothing"),
        ("activations: {keep: false}\nalignment: {gain: true}", "activations.keep"),
        ("mesh: fsdp=4096", "devices"),
        ("texts: /nowhere.txt", "cannot read texts"),
    ],
)
def test_what_a_recipe_asks_in_vain(capsys, tmp_path, pair, recipe, message):
    (tmp_path / "recipe.yaml").write_text(recipe)
    code, report, error = doctor(capsys, tmp_path / "recipe.yaml", "--source", pair[0], "--target", pair[1])
    assert code == 2
    assert message in error
    assert report["models"]["source"] and report["models"]["target"]


def test_options_that_shrink_a_run(pair):
    def peak(**sections) -> dict:
        values = {"source": str(pair[0]), "target": str(pair[1]), "texts": "-", "out": "-"} | sections
        return examine(build_recipe(values), texts=False)["memory"]

    every = peak()
    assert peak(alignment={"layer_top_k": 1})["stages"]["alignment (on disk)"] < every["stages"]["alignment (on disk)"]
    banded = peak(alignment={"layer_pairs": "band", "layer_band": 0.1})
    assert banded["sites"]["q"]["pairs"] < every["sites"]["q"]["pairs"] == 24
    assert "moments" in peak(activations={"keep": False})["stages"]


def test_an_orbax_directory_and_the_tables(capsys, tmp_path, llama_dir, qwen2_dir):
    orbax.save(load_model(llama_dir), tmp_path / "orbax")
    assert cli.run(["doctor", "--source", str(tmp_path / "orbax"), "--target", str(qwen2_dir)]) == 0
    out = capsys.readouterr().out
    for piece in ("Models", "Projections", "Tokenizers", "estimate, not a measurement", "Assumed", "can be merged"):
        assert piece in out


def test_both_models_must_be_named(capsys):
    assert cli.run(["doctor", "--source", "x"]) == 2
    assert "--target" in capsys.readouterr().err


def test_devices_of_the_data_axis_repeat_the_weights(capsys, pair):
    held = {}
    for mesh in ("data=2", "fsdp=2", "data=2,fsdp=2,tensor=2"):
        _, report, _ = doctor(capsys, "--source", pair[0], "--target", pair[1], "--mesh", mesh)
        held[mesh] = report["memory"]["weights_per_device"]
        whole = sum(model["bytes"] for model in report["models"].values())
    assert held == {"data=2": whole, "fsdp=2": whole / 2, "data=2,fsdp=2,tensor=2": whole / 4}


def test_a_solver_without_room_is_said_before_anything_runs(capsys, tmp_path, pair, flags, texts):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("alignment: {memory_mib: 1}")
    models = ("--source", pair[0], "--target", pair[1])
    code, report, error = doctor(capsys, recipe, *models, "--texts", texts["calibration"])
    assert code == 2 and not report["mergeable"]
    assert "memory_mib 1 is too little for 128 x 192 units" in error
    # Rows that nobody gave are no reason to refuse.
    code, report, _ = doctor(capsys, recipe, *models)
    assert code == 0 and any("memory_mib 1 is too little" in note for note in report["notes"])
    assert cli.run(["merge", str(recipe), *flags, "--out", str(tmp_path / "run")]) == 2
    assert "memory_mib 1 is too little" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
