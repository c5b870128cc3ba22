"""The whole job through the command line, its contract, resuming, and every kind of bad input."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers import edit_config, edit_tensors, stored

from tmjax import cli
from tmjax.activations import capture as capture_module
from tmjax.align import storage as alignment_store
from tmjax.checkpoints import hf
from tmjax.checkpoints.load import load_model
from tmjax.commands.merge import run as merge
from tmjax.commands.merge.other_sources import other_sources
from tmjax.models.decoder import forward
from tmjax.ot.solvers.sinkhorn import Sinkhorn
from tmjax.runs.manifest import read_manifest
from tmjax.runs.run_files import split
from tmjax.transfer.recipe import build_recipe

transformers.utils.logging.disable_progress_bar()
OTHERS = {"self_source", "same_size_source"}
ARMS = (
    {"target", "source", "merged"}
    | OTHERS
    | {f"control:{name}" for name in ("shrink", "random_source", "permuted_plan", "shuffled_rows")}
)


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="session")
def target_dir(small_flags) -> Path:
    return Path(small_flags[small_flags.index("--target") + 1])


@pytest.fixture(scope="session")
def whole(tmp_path_factory, small_flags, target_dir, recipe_file) -> tuple[Path, dict]:
    """One run with controls in a process of its own, its standard output being one JSON object."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    command = [
        sys.executable,
        "-m",
        "tmjax.cli",
        "merge",
        recipe_file,
        *small_flags,
        "--out",
        str(out),
        "--controls",
        "--same-size-source",
        str(target_dir),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_manifest_keeps_the_contract(whole) -> None:
    out, printed = whole
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == printed
    assert (
        manifest["seed"] == 0 and manifest["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1} and manifest["devices"] == 1
    )
    assert set(manifest["inputs"]) == {"source", "target", "texts", "valid", "test"}
    assert all(len(item["sha256"]) == 64 and Path(item["path"]).exists() for item in manifest["inputs"].values())
    assert set(manifest["evaluation"]) == ARMS
    for item in manifest["evaluation"].values():
        low, high = item["ci95"]
        assert low < item["bits_per_byte"] < high and item["documents"] == 20
    gain = manifest["source_gain"]
    best = min((arm for arm in ARMS if ":" in arm), key=lambda arm: manifest["evaluation"][arm]["bits_per_byte"])
    difference = manifest["evaluation"][best]["bits_per_byte"] - manifest["evaluation"]["merged"]["bits_per_byte"]
    assert gain["best_control"] == best and gain["bits_per_byte"] == pytest.approx(difference)
    assert gain["ci95"][0] <= gain["bits_per_byte"] + 1e-9 and len(gain["ci95"]) == 2 and "fraction_of_gap" in gain
    assert len(manifest["update"]) == 2 * 7
    for item in manifest["update"].values():
        assert {"transported_to_target_norm", "effective_update", "cosine", "alpha"} <= set(item)
    for item in manifest["alignment"].values():
        assert item["problems"] == 6 and item["converged"] == 6 and item["max_marginal_error"] < 3e-5
    for item in manifest["stages"].values():
        assert item["seconds"] >= 0 and item["peak_rss_mib"] > 0 and item["reused"] is False
    trials = {arm: len(item["trials"]) for arm, item in manifest["controls"].items()}
    assert set(trials.values()) == {len(manifest["coefficients"]["trials"])}, "every arm gets the same budget"


def test_the_target_as_its_own_source_can_be_left_out() -> None:
    given = {"source": "-", "target": "-", "texts": "-", "out": "-", "controls": True}
    assert set(other_sources(build_recipe(given))) == {"self_source"}
    assert other_sources(build_recipe(given | {"self_source": False})) == {}


def test_other_sources_are_runs_of_their_own(whole, target_dir) -> None:
    """The target as the source of the same size is the target merged into itself, and neither is a control."""
    out, manifest = whole
    evaluation = manifest["evaluation"]
    bits = {arm: evaluation[arm]["bits_per_byte"] for arm in (*OTHERS, "target")}
    assert bits["self_source"] == bits["same_size_source"] != bits["target"]
    assert manifest["source_gain"]["best_control"] not in OTHERS
    for arm in OTHERS:
        told = read_manifest(out / "sources" / arm)
        assert told["inputs"]["source"]["sha256"] == told["inputs"]["target"]["sha256"]
        assert told["evaluation"] == {} and (out / "sources" / arm / "merged/model.safetensors").is_file()
        fused = load_model(out / "sources" / arm / "merged").params
        own = load_model(target_dir).params
        assert set(fused) == set(own) and any(not np.array_equal(fused[path], own[path]) for path in own)


def test_run_directory_holds_what_it_should_and_nothing_partial(whole) -> None:
    out, _ = whole
    for name in (
        "recipe.yaml",
        "activations/source",
        "activations/target",
        "alignment",
        "merged",
        "samples.json",
        "report.html",
        "plots",
    ):
        assert (out / name).exists()
    assert sorted(path.name for path in (out / "controls").iterdir()) == sorted(arm for arm in ARMS if ":" in arm)
    assert not list(out.rglob("*.partial")) and not list(out.rglob(".*lock"))
    assert split(out, read_manifest(out))[1] == []  # all of it is known for the run's own
    card = (out / "merged/README.md").read_text()
    assert "llama" not in card.split("---")[1] and "self_attn.q_proj" in card and "preset: barycentric" in card
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "http://" not in page and "https://" not in page
    names = {path.name for path in (out / "merged").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names


@pytest.mark.parametrize("arm", ["merged", "controls/control:shuffled_rows"])
def test_transformers_loads_generates_and_agrees(whole, target_dir, arm: str) -> None:
    out, manifest = whole
    reference = transformers.AutoModelForCausalLM.from_pretrained(out / arm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / arm)
    prompt = tokenizer("Yesu akawaambia", return_tensors="pt", return_token_type_ids=False)
    generated = reference.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert generated.shape[1] > prompt["input_ids"].shape[1] and tokenizer.decode(generated[0])
    model = load_model(out / arm)
    ids = np.random.default_rng(0).integers(3, 2000, (2, 200))
    with torch.no_grad():
        truth = reference(torch.tensor(ids)).logits.numpy()
    assert np.abs(np.asarray(forward(model.spec, model.params, ids)) - truth).max() <= 1e-4 * truth.std()
    changed = [name for name, value in stored(out / arm).items() if value != stored(target_dir)[name]]
    if arm == "merged":
        biases = {name.replace("weight", "bias") for name in manifest["update"] if name.split(".")[-2][0] in "qkv"}
        assert set(changed) == set(manifest["update"]) | biases


def test_second_start_reuses_every_stage(whole, small_flags, recipe_file, target_dir, capsys) -> None:
    out, first = whole
    flags = [*small_flags, "--same-size-source", target_dir]
    times = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"
    }
    code, printed, _ = _run(capsys, "merge", recipe_file, *flags, "--out", out, "--controls", "--json")
    again = json.loads(printed)
    assert code == 0 and [name for name, stage in again["stages"].items() if not stage["reused"]] == []
    assert again["evaluation"] == first["evaluation"] and again["update"] == first["update"]
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_damaged_output_is_made_again_and_the_rest_reused(
    whole, small_flags, recipe_file, target_dir, capsys, tmp_path
) -> None:
    out, flags = tmp_path / "copy", [*small_flags, "--same-size-source", target_dir]
    shutil.copytree(whole[0], out)
    before = stored(out / "merged")
    (out / "merged/model.safetensors").write_bytes(b"half")
    code, printed, _ = _run(capsys, "merge", recipe_file, *flags, "--out", out, "--controls", "--json")
    stages = json.loads(printed)["stages"]
    assert code == 0 and [name for name, stage in stages.items() if not stage["reused"]] == [
        "fuse",
        "card",
        "provenance",
    ]
    assert stored(out / "merged") == before
    assert (out / "merged/README.md").read_text() == (whole[0] / "merged/README.md").read_text()


def test_evaluate_gives_the_manifests_numbers(whole, texts, target_dir, capsys) -> None:
    out, manifest = whole
    code, printed, _ = _run(capsys, "evaluate", out / "merged", target_dir, "--texts", texts["test"], "--json")
    result = json.loads(printed)["evaluation"]
    assert code == 0 and list(result) == [str(out / "merged"), str(target_dir)]
    item, held = result[str(out / "merged")], manifest["evaluation"]["merged"]
    assert set(item) == {"bits_per_byte", "ci95", "documents", "bytes", "tokens"}
    assert item["bits_per_byte"] == pytest.approx(held["bits_per_byte"], rel=1e-6) and item["bytes"] == held["bytes"]


# Interruption: the stage in progress leaves nothing, what was finished is reused, the result is the same.


class Interrupted(Exception):
    """Stands for the moment at which a run is stopped."""


STAGES = {
    "activations:target": (capture_module, "pooled_forward"),
    "alignment": (alignment_store, "save"),
    "fuse": (hf, "write"),
    "evaluate": (merge, "evaluation_facts"),
    "report": (merge, "write_report"),
}


def test_interrupted_at_every_stage_gives_the_same_result(
    small, small_flags, recipe_file, capsys, tmp_path, monkeypatch
) -> None:
    out, finished = tmp_path / "run", []
    for stage, (module, name) in STAGES.items():

        def stop(*_args, **_kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            code, printed, error = _run(capsys, "merge", recipe_file, *small_flags, "--out", out)
        assert code == 130 and not printed and "tmjax: error: interrupted" in error and "Traceback" not in error
        manifest = read_manifest(out)
        assert stage not in manifest["outputs"] and not list(out.rglob("*.partial"))
        assert all(manifest["stages"][done]["reused"] for done in finished)
        finished = list(manifest["outputs"])
    code, _, _ = _run(capsys, "merge", recipe_file, *small_flags, "--out", out)
    assert code == 0
    assert stored(out / "merged") == stored(small / "merged")
    assert read_manifest(out)["evaluation"] == read_manifest(small)["evaluation"]


@pytest.mark.slow
def test_killed_without_warning_and_started_again(plain, flags, recipe_file, tmp_path) -> None:
    """SIGKILL in the middle of two stages; the third start finishes with the same tensors."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tmjax.cli", "merge", recipe_file, *flags, "--out", str(out)]
    for waited_for in ("activations/source.partial", "merged.partial"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while not (out / waited_for).exists():
            assert process.poll() is None and time.monotonic() < deadline, f"never saw {waited_for}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert (out / waited_for).exists() and not (out / waited_for.removesuffix(".partial")).exists()
    assert cli.run([*command[3:]]) == 0
    stages = read_manifest(out)["stages"]
    assert [name for name, stage in stages.items() if stage["reused"]] == [
        "activations:target",
        "activations:source",
        "alignment",
    ]
    assert stored(out / "merged") == stored(plain / "merged") and not list(out.rglob("*.partial"))


def test_align_then_fuse_equals_merge_and_alpha_can_change(small, small_flags, recipe_file, capsys, tmp_path) -> None:
    out = tmp_path / "run"
    assert _run(capsys, "align", recipe_file, *small_flags, "--out", out)[0] == 0
    assert (out / "alignment").is_dir() and not (out / "merged").exists()
    assert _run(capsys, "fuse", out)[0] == 0
    assert stored(out / "merged") == stored(small / "merged")
    code, _, error = _run(capsys, "fuse", out, "--alpha", "0.2")
    assert code == 2 and "--overwrite" in error
    code, printed, _ = _run(capsys, "fuse", out, "--alpha", "0.2", "--overwrite", "--json")
    manifest = json.loads(printed)
    assert code == 0 and manifest["stages"]["alignment"]["reused"] and not manifest["stages"]["fuse"]["reused"]
    assert (
        {item["alpha"] for item in manifest["update"].values()} == {0.2}
        and manifest["inputs"]["test"]["path"] == small_flags[-1]
        and manifest["coefficients"]["trials"] == []
    )


@pytest.mark.slow
def test_paper_preset_is_refused_as_a_no_op(flags, capsys, tmp_path) -> None:
    arguments = ["merge", *flags, "--preset", "paper", "--out", tmp_path / "run"]
    code, _, error = _run(capsys, *arguments)
    assert code == 3 and error.strip().splitlines()[-1].startswith(
        "tmjax: error: nothing measurable came from the source"
    )
    assert not (tmp_path / "run/merged").exists()
    code, printed, error = _run(capsys, *arguments, "--allow-negligible", "--json")  # goes on with the refused run
    assert code == 0 and "tmjax: warning: nothing measurable" in error
    assert json.loads(printed)["stages"]["alignment"]["reused"]
    assert 0 < max(item["source_part"] for item in json.loads(printed)["update"].values()) < 1e-3


def test_non_convergence_is_said(small_flags, capsys, tmp_path, monkeypatch) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {"alpha": 0.1, "alignment": {"max_iterations": 1}, "preset": "barycentric"}
            | {"operators": [{"transport": {"roles": ["q"]}}]}
        )
    )
    code, printed, error = _run(capsys, "align", recipe, *small_flags, "--out", tmp_path / "run", "--json")
    assert code == 0 and error.count("plans of attn_in did not converge") == 1
    assert json.loads(printed)["alignment"]["attn_in"]["converged"] < 6
    assert Sinkhorn().max_iterations > 1


# Bad input: one line, exit status 2, nothing written.


def _broken(tmp_path, original, change) -> str:
    directory = tmp_path / "model"
    shutil.copytree(original, directory)
    change(directory)
    return str(directory)


def _truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _nan(tensors: dict) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan


MODEL_DEFECTS = {
    "truncated": (_truncate, "truncated"),
    "missing tensor": (
        lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")),
        "missing tensor model.norm.weight",
    ),
    "extra tensor": (lambda d: edit_tensors(d, lambda t: t.update(x=np.ones(2, "f"))), "unexpected tensor x"),
    "misshapen": (lambda d: edit_config(d, intermediate_size=380), "has shape [384, 128], expected [380, 128]"),
    "model_type": (lambda d: edit_config(d, model_type="mamba"), "supported are arcee"),
    "NaN": (lambda d: edit_tensors(d, _nan), "mlp.up_proj.weight holds NaN or infinity"),
    "config": (lambda d: (d / "config.json").write_text("{"), "config.json is not readable JSON"),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors"),
}


@pytest.mark.parametrize("defect", MODEL_DEFECTS)
def test_bad_checkpoint(defect: str, flags, qwen2_dir, capsys, tmp_path) -> None:
    change, message = MODEL_DEFECTS[defect]
    target = _broken(tmp_path, qwen2_dir, change)
    _refused(capsys, tmp_path / "out", message, "merge", *flags, "--target", target, "--out", tmp_path / "out")


def _refused(capsys, out: Path, message: str, *arguments: object) -> None:
    code, printed, error = _run(capsys, *arguments)
    lines = error.strip().splitlines()
    assert code == 2 and not printed
    assert len(lines) == 1 and lines[0].startswith("tmjax: error: ") and message in lines[0], error
    assert not out.exists()


TEXT_DEFECTS = {
    "empty": (b"", "holds no text"),
    "blank": (b"\n  \n", "holds no text"),
    "latin-1": ('{"text": "Yésu"}\n'.encode("latin-1"), "is not UTF-8"),
    "not JSON": (b"Yesu\n", "line 1 is not JSON"),
    "no text field": (b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no text field"),
    "same id twice": (b'{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "id 1 occurs twice"),
    "nothing shared": (b'{"text": "<pad> <s>"}\n', "no piece of text is read by both models"),
}


@pytest.mark.parametrize("defect", TEXT_DEFECTS)
def test_bad_texts(defect: str, flags, capsys, tmp_path) -> None:
    content, message = TEXT_DEFECTS[defect]
    (tmp_path / "t.jsonl").write_bytes(content)
    out = tmp_path / "out"
    _refused(capsys, out, message, "merge", *flags, "--texts", tmp_path / "t.jsonl", "--out", out)


OPTION_DEFECTS = {
    "missing directory": (["--source", "no/such/place/here"], "no checkpoint at no/such/place/here"),
    "missing texts": (["--texts", "no.jsonl"], "cannot read texts no.jsonl"),
    "wrong suffix": (["--texts", "pyproject.toml"], "texts are a .jsonl or .txt file"),
    "alpha": (["--alpha", "1.5"], "alpha: Input should be less than or equal to 1"),
    "alpha no number": (["--alpha", "much"], "Invalid value for '--alpha'"),
    "same-size source": (["--same-size-source", "nowhere/model", "--controls"], "nowhere/model"),
    "preset": (["--preset", "magic"], "preset 'magic' is not known; known are predictions, quick, barycentric, paper"),
    "mesh": (["--mesh", "pods=2"], "mesh 'pods=2'"),
    "mesh too large": (["--mesh", "data=64"], "needs 64 devices"),
    "mesh that does not divide": (["--mesh", "tensor=3"], "does not divide"),
    "unknown option": (["--alhpa", "1"], "No such option: --alhpa"),
    "seed": (["--seed", "-1"], "seed: Input should be greater than or equal to 0"),
}


@pytest.mark.parametrize("defect", OPTION_DEFECTS)
def test_bad_options(defect: str, flags, capsys, tmp_path) -> None:
    given, message = OPTION_DEFECTS[defect]
    _refused(capsys, tmp_path / "out", message, "merge", *flags, "--out", tmp_path / "out", *given)


def test_a_refusal_is_one_line(tmp_path) -> None:
    """As a user's terminal shows it: no empty line of a display that never had anything to show."""
    command = [sys.executable, "-m", "tmjax.cli", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("tmjax: error: ")


RECIPE_DEFECTS = {
    "unknown key": ("sauce: x\n", "sauce: unknown key"),
    "unknown nested key": ("coefficients: {alpah: 1}\n", "coefficients.alpah: unknown key"),
    "unknown option": ("operators: [{transport: {alpah: 1}}]\n", "operators.0.transport.alpah: unknown key"),
    "unknown operator": ("operators: [{teleport: {}}]\n", "operator 'teleport' is not known; known are embeddings"),
    "two in one entry": ("operators: [{transport: {}, embeddings: {}}]\n", "write one operator per entry"),
    "old section": ("fusion: {solve: {rounds: 3}}\n", "fusion.solve is now operators: [..., {predictions: {...}}]"),
    "alpha in the grid": ("coefficients: {alphas: [0.1, 2]}\n", "coefficients.alphas.1"),
    "solver": ("alignment: {solver: magic}\n", "solver 'magic' is not known; known are assignment"),
    "not a mapping": ("- a\n", "does not hold a mapping"),
    "not YAML": ("a: [\n", "is not YAML"),
    "two faults": ("alpha: -1\nseed: x\n", "alpha: Input should be greater"),
}


@pytest.mark.parametrize("defect", RECIPE_DEFECTS)
def test_bad_recipe(defect: str, flags, capsys, tmp_path) -> None:
    content, message = RECIPE_DEFECTS[defect]
    (tmp_path / "r.yaml").write_text(content)
    _refused(capsys, tmp_path / "out", message, "merge", tmp_path / "r.yaml", *flags, "--out", tmp_path / "out")


def test_missing_options_are_listed_and_alpha_needs_valid(flags, capsys, tmp_path) -> None:
    _refused(capsys, tmp_path / "out", "give --texts, --out", "merge", *flags[:4])
    at = flags.index("--valid")
    without = flags[:at] + flags[at + 2 :]
    _refused(capsys, tmp_path / "out", "give --valid", "merge", *without, "--out", tmp_path / "out")


def test_an_input_inside_the_output_is_never_overwritten(small, small_flags, recipe_file, capsys, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small, run)
    arguments = ["merge", recipe_file, *small_flags, "--target", run / "merged", "--out", run, "--overwrite"]
    code, _, error = _run(capsys, *arguments)
    assert code == 2 and "target lies inside the output" in error
    assert stored(run / "merged") == stored(small / "merged")


def test_output_that_exists_is_refused(small, small_flags, recipe_file, capsys, tmp_path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for extra in ([], ["--overwrite"]):  # --overwrite replaces runs, never another directory
        code, _, error = _run(capsys, "merge", *small_flags, "--out", other, *extra)
        assert code == 2 and "is not a run of tmjax" in error
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
    run = tmp_path / "run"
    shutil.copytree(small, run)
    code, _, error = _run(capsys, "merge", recipe_file, *small_flags, "--out", run, "--seed", "7")
    assert code == 2 and "run with another recipe or other inputs" in error and read_manifest(run)["seed"] == 0


def test_convert_both_ways_and_its_errors(llama_dir, capsys, tmp_path) -> None:
    code, printed, _ = _run(capsys, "convert", llama_dir, tmp_path / "orbax", "--to", "orbax", "--json")
    assert code == 0 and json.loads(printed)["model_type"] == "llama"
    assert _run(capsys, "convert", tmp_path / "orbax", tmp_path / "hf", "--to", "hf")[0] == 0
    assert stored(tmp_path / "hf") == stored(llama_dir)
    for arguments, message in (
        ([llama_dir, tmp_path / "hf", "--to", "hf"], "exists; choose another output or pass --overwrite"),
        ([llama_dir, tmp_path / "x", "--to", "gguf"], "write hf, orbax or lora"),
        ([tmp_path / "nothing", tmp_path / "x", "--to", "hf"], "no checkpoint at"),
        ([llama_dir, tmp_path / "x", "--to", "hf", "--max-shard-size", "big"], "'big' is not a size"),
    ):
        _refused(capsys, tmp_path / "x", message, "convert", *arguments)
    _refused(capsys, tmp_path / "x", "give --texts FILE, --tasks NAMES or both", "evaluate", llama_dir)


def test_help_and_no_arguments(capsys) -> None:
    code, printed, _ = _run(capsys, "--help")
    assert code == 0 and all(name in printed for name in ("merge", "align", "fuse", "evaluate", "convert"))
    code, printed, error = _run(capsys)
    assert code == 2 and not printed and error.startswith("tmjax: error: Missing command")
