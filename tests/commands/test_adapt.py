"""`tmjax adapt` through the command line: its contract, PyTorch's word on what comes out, resuming, bad input."""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
import yaml
from helpers import stored

import tmjax
from tmjax import cli
from tmjax.checkpoints.hf import export
from tmjax.checkpoints.load import load_model
from tmjax.commands.adapt.training import ArmTrainer
from tmjax.commands.recipe_check import adapt_stages
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.recipes.base import read_recipe
from tmjax.recipes.objectives import DistillationOptions
from tmjax.runs.manifest import Manifest, read_manifest
from tmjax.runs.run_files import split
from tmjax.text.documents import read_texts
from tmjax.train.modes import Plain, Residual
from tmjax.train.step import fold

transformers.utils.logging.disable_progress_bar()
#: One row length, few steps: what keeps these runs short.
SHORT = {
    "mesh": "data=1",
    "max_texts": 16,
    "training": {"steps": 6, "warmup": 2, "tokens_per_step": 512, "row_lengths": 1, "validate_every": 3, "lr": 3e-4},
    "evaluation": {"draws": 200},
}


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run(["adapt", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="session")
def short(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapt") / "recipe.yaml"
    path.write_text(yaml.safe_dump(SHORT))
    return path


@pytest.fixture(scope="session")
def guided(tmp_path_factory, flags, short) -> Path:
    """A guided run with its controls, in this process."""
    out = tmp_path_factory.mktemp("guided") / "run"
    assert cli.run(["adapt", str(short), *flags, "--out", str(out), "--mode", "guided", "--controls"]) == 0
    return out


def test_manifest_keeps_the_contract(guided) -> None:
    manifest = read_manifest(guided)
    controls = {"control:sft", "control:shuffled_rows", "control:random_source"}
    assert set(manifest["evaluation"]) == {"target", "source", "adapted"} | controls
    assert set(manifest["inputs"]) == {"source", "target", "texts", "valid", "test"}
    assert manifest["source_gain"]["best_control"] in controls and manifest["seed"] == 0
    for arm, facts in manifest["training"].items():
        assert [step for step, _ in facts["valid_history"]] == [0, 3, 6] and facts["steps"] == 6
        assert facts["valid_bits_per_byte"] == min(loss for _, loss in facts["valid_history"])
        assert facts["mode"] == "sft" and facts["terms"] == ([] if arm == "control:sft" else ["guidance"])
        assert (guided / ("merged" if arm == "adapted" else f"controls/{arm}") / "model.safetensors").is_file()
    explained = {arm: facts.get("explained_at_start") for arm, facts in manifest["training"].items()}
    assert min(explained["adapted"]) > max(explained["control:shuffled_rows"]) and explained["control:sft"] is None
    assert not list(guided.rglob("*.partial")) and not list(guided.rglob("checkpoints"))
    page = (guided / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "control:shuffled_rows" in page
    assert "mode `guided`" in (guided / "merged/README.md").read_text()


def test_log_has_a_line_for_every_step(guided) -> None:
    for arm, weight in (("adapted", 5.0), ("control:sft", 0.0)):
        with (guided / "training" / arm / "lr-0.0003/log.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [int(row["step"]) for row in rows] == list(range(1, 7))
        assert [bool(row["valid"]) for row in rows] == [False, False, True] * 2
        for row in rows:
            total = float(row["text"]) + weight * float(row["guide"])
            assert float(row["loss"]) == pytest.approx(total) and float(row["tokens"]) > 0


def test_a_finished_run_goes_on_with_a_lora(guided, short, flags, tmp_path, capsys) -> None:
    shutil.copytree(guided, tmp_path / "run", copy_function=shutil.copy2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(short.read_text()) | {"export": {"lora": 4}}))
    words = [*flags, "--out", tmp_path / "run", "--mode", "guided", "--controls", "--json"]
    code, printed, _ = run(capsys, tmp_path / "recipe.yaml", *words)
    manifest = json.loads(printed)
    new = [name for name, stage in manifest["stages"].items() if not stage["reused"]]
    assert code == 0 and sorted(new) == ["card", "lora", "provenance", "report"]
    config = json.loads((tmp_path / "run/lora/adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == flags[3]
    assert all(0 < error < 1 for error in manifest["lora"]["errors"].values())
    assert '<table id="lora"' in (tmp_path / "run/report.html").read_text()


def test_stages_are_those_that_a_check_says(guided) -> None:
    stages = adapt_stages(build_adapt_recipe(read_recipe(guided / "recipe.yaml")))
    assert set(stages) == read_manifest(guided)["stages"].keys()


def test_a_finished_run_can_be_published(guided, capsys) -> None:
    assert cli.run(["publish", str(guided), "me/adapted", "--dry-run", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files == {path.name: path.stat().st_size for path in (guided / "merged").iterdir()}
    assert {"tmjax.json", "README.md", "model.safetensors"} <= files.keys()
    card = (guided / "merged/README.md").read_text()
    assert "base_model_relation: merge" in card and "\ntmjax adapt " in card


def test_pytorch_gives_the_manifests_bits_per_byte(guided, texts) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(guided / "merged", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(guided / "merged")
    nats, size = 0.0, 0
    for text in read_texts(texts["test"]).texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([ids])
        with torch.no_grad():
            nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size += len(text.encode())
    held = read_manifest(guided)["evaluation"]["adapted"]["bits_per_byte"]
    assert nats / math.log(2) / size == pytest.approx(held, abs=1e-3)


def test_second_start_reuses_everything(guided, flags, short, capsys) -> None:
    before = stored(guided / "merged")
    code, out, _ = run(capsys, short, *flags, "--out", guided, "--mode", "guided", "--controls", "--json")
    manifest = json.loads(out)
    assert code == 0 and all(stage["reused"] for stage in manifest["stages"].values())
    assert stored(guided / "merged") == before and split(guided, manifest)[1] == []
    code, _, error = run(capsys, short, *flags, "--out", guided, "--mode", "sft")
    assert code == 2 and "another recipe" in error


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again_gives_the_same_bits(flags, tmp_path) -> None:
    """SIGKILL after the second checkpoint; what the second start writes is what an uninterrupted run writes."""
    recipe = tmp_path / "recipe.yaml"
    training = SHORT["training"] | {"steps": 60, "keep_every": 10, "validate_every": 20}
    recipe.write_text(yaml.safe_dump(SHORT | {"training": training, "mode": "sft"}))
    without_test = flags[: flags.index("--test")]

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "tmjax.cli", "adapt", str(recipe), *without_test, "--out", str(tmp_path / out)]

    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, deadline = tmp_path / "killed/training/adapted/lr-0.0003", time.monotonic() + 300
    while not (folder / "checkpoints/20").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, "never saw the second checkpoint"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed/merged").exists()
    for out in ("whole", "killed"):
        done = subprocess.run(command(out), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert stored(tmp_path / "killed/merged") == stored(tmp_path / "whole/merged")
    facts = [read_manifest(tmp_path / out)["training"]["adapted"] for out in ("whole", "killed")]
    assert facts[0] == facts[1]
    logs = []
    for out in ("whole", "killed"):
        with (tmp_path / out / folder.relative_to(tmp_path / "killed") / "log.csv").open(newline="") as stream:
            logs.append([(row["step"], row["loss"], row["lr"], row["valid"]) for row in csv.DictReader(stream)])
    assert logs[0] == logs[1] and len(logs[0]) == 60


def test_folded_and_unfolded_model_give_the_same_logits(qwen2_dir, tmp_path) -> None:
    """PyTorch runs W_base x + (alpha Mask Delta) x with two separate products; the folded checkpoint is one."""
    model = load_model(qwen2_dir)
    rng = np.random.default_rng(0)
    held, extra = {}, {}
    for role, row in model.projections.items():
        shape = model.params[row.path].shape
        delta = rng.normal(0, float(jnp.std(model.params[row.path])), shape).astype(np.float32)
        kept = (shape[0], 1, shape[2]) if role in ("o", "down") else (shape[0], shape[1], 1)
        mask = (rng.random(kept) < 0.5).astype(np.float32)
        held[row.path] = Residual(jnp.float32(0.2), jnp.asarray(mask), jnp.asarray(delta))
        names = row.names(model.spec)
        extra |= {name: 0.2 * mask[layer] * delta[layer] for layer, name in enumerate(names)}
    folded = fold(Plain(), dict(model.params), held)
    export(model.with_params(folded), tmp_path / "folded")
    ids = torch.from_numpy(rng.integers(3, 2000, (2, 60)))
    unfolded, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (qwen2_dir, tmp_path / "folded")
    )
    with torch.no_grad():
        before = unfolded(ids).logits
        for name, module in unfolded.named_modules():
            if f"{name}.weight" in extra:
                part = torch.from_numpy(extra[f"{name}.weight"])
                module.register_forward_hook(lambda _m, x, y, part=part: y + torch.nn.functional.linear(x[0], part))
        truth, found = unfolded(ids).logits, whole(ids).logits
    assert (truth - found).abs().max() <= 1e-5 * truth.std() and (before - truth).abs().max() > 0.1 * truth.std()


@pytest.mark.slow
def test_residual_frozen_adapts_a_run_of_merge(plain, short, flags, capsys, tmp_path) -> None:
    texts = flags[flags.index("--texts") :]
    arguments = [short, "--target", plain, *texts, "--out", tmp_path / "run", "--mode", "residual-frozen", "--json"]
    code, out, error = run(capsys, *arguments, "--steps", 1, "--alpha", "0.1")
    assert code == 2 and "warm-up" in error  # said before anything is written
    code, out, error = run(capsys, *arguments, "--steps", 3)
    assert code == 0, error
    manifest, merge = json.loads(out), read_manifest(plain)
    assert set(manifest["evaluation"]) == {"target", "source", "adapted"} and manifest["source_gain"] is None
    assert manifest["update"] == merge["update"] and manifest["training"]["adapted"]["init"] == "merged"
    start = manifest["training"]["adapted"]["valid_history"][0]
    # Before the first step W_base + alpha Mask Delta is the merged model.
    assert start[0] == 0 and start[1] == pytest.approx(merge["coefficients"]["valid_bits_per_byte"], abs=1e-4)
    assert {name for name, item in manifest["inputs"].items()} == {"source", "target", "texts", "valid", "test"}


@pytest.fixture(scope="session")
def lora(tmp_path_factory, short, flags) -> Path:
    """A run of mode lora on two projections, with two learning rates."""
    folder = tmp_path_factory.mktemp("lora")
    values = yaml.safe_load(short.read_text()) | {"lora": {"rank": 4, "roles": ["q", "down"]}, "mode": "lora"}
    values["training"] = values["training"] | {"lr": [1e-3, 5e-2], "steps": 3}
    (folder / "r.yaml").write_text(yaml.safe_dump(values))
    rest = flags[flags.index("--target") : flags.index("--test")]
    assert cli.run(["adapt", str(folder / "r.yaml"), *rest, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_lora_adapter_by_hand_is_the_merged_checkpoint(lora, qwen2_dir) -> None:
    facts = read_manifest(lora)["training"]["adapted"]
    assert [item["lr"] for item in facts["tried"]] == [1e-3, 5e-2]
    assert facts["valid_bits_per_byte"] == min(item["valid_bits_per_byte"] for item in facts["tried"])
    config = json.loads((lora / "adapter/adapter_config.json").read_text())
    adapter = safetensors.numpy.load_file(lora / "adapter/adapter_model.safetensors")
    base, merged = (safetensors.numpy.load_file(d / "model.safetensors") for d in (qwen2_dir, lora / "merged"))
    assert config["target_modules"] == ["self_attn.q_proj", "mlp.down_proj"] and len(adapter) == 4 * 2 * 2
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert changed == {key.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for key in adapter}
    for name in changed:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        b, a = adapter[f"{key}.lora_B.weight"], adapter[f"{key}.lora_A.weight"]
        np.testing.assert_allclose(base[name] + config["lora_alpha"] / config["r"] * b @ a, merged[name], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_loads_the_adapter(lora, qwen2_dir) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; the adapter is checked by hand above")
    base, merged = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (qwen2_dir, lora / "merged"))
    model = peft.PeftModel.from_pretrained(base, lora / "adapter")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert (model(ids).logits - merged(ids).logits).abs().max() < 1e-4


def test_leaks_are_said(short, flags, capsys, tmp_path) -> None:
    calibration = flags[flags.index("--texts") + 1]
    rest = [*flags[: flags.index("--valid")], "--valid", calibration]
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("in the way")
    code, _, error = run(capsys, short, *rest, "--out", out, "--mode", "sft")
    assert code == 2 and "16 of 24 validation documents are inside the training texts" in " ".join(error.split())


WRONG = {
    "no target": (["--target"], [], "give --target"),
    "mode": ([], ["--mode", "magic"], "mode: Input should be 'sft'"),
    "no source": (["--source"], ["--mode", "guided"], "mode guided takes a source"),
    "merged of what": (["--source"], ["--mode", "sft", "--init", "merged"], "init merged takes a source"),
    "rates without valid": (["--valid"], ["--mode", "sft", "--lr", "1e-3,1e-4"], "give --valid"),
    "rate": ([], ["--lr", "fast"], "training.lr.0"),
    "warm-up": ([], ["--steps", "1"], "warm-up of 2 steps"),
    "texts": (["--texts"], ["--texts", "{tmp}/none.jsonl"], "none.jsonl"),
    "column": (["--texts"], ["--texts", "{tmp}/body.jsonl"], "line 1 has body; it needs text"),
    "dialogues": (["--texts"], ["--texts", "{tmp}/talk.jsonl"], "mode combined reads plain documents"),
    "mesh": ([], ["--mesh", "data=1024"], "needs 1024 devices"),
    "former key": ([], ["{tmp}/former.yaml"], "written: this key is called generation now"),
    "run without alignment": (["--target"], ["--target", "{tmp}/run"], "is a run without an alignment"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_nothing_is_written(case, short, flags, capsys, tmp_path) -> None:
    without, more, message = WRONG[case]
    (tmp_path / "body.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "talk.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "former.yaml").write_text(yaml.safe_dump(SHORT | {"written": {"texts": 4}}))
    (tmp_path / "run").mkdir()
    where = {"mesh": {"data": 1}, "devices": 1, "platform": "cpu"}
    manifest = Manifest(tmjax="0", seed=0, inputs={}, key={"recipe": "1"}, **where)
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest.to_json()))
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    given = [part for name, value in pairs.items() if name not in without for part in (name, value)]
    more = [part.format(tmp=tmp_path) for part in more]
    recipe = [] if more and more[0].endswith(".yaml") else [short]
    code, out, error = run(capsys, *recipe, *more, *given, "--out", tmp_path / "out")
    last = error.strip().splitlines()[-1]
    assert code == 2 and not out and last.startswith("tmjax: error: ") and message in last and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_is_one_line_and_keeps_the_state(short, flags, capsys, tmp_path) -> None:
    out = tmp_path / "run"
    values = yaml.safe_load(short.read_text())
    values["training"] = values["training"] | {"lr": 1e30, "clip": 1e30}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    rest = flags[flags.index("--target") : flags.index("--valid")]
    code, _, error = run(capsys, tmp_path / "r.yaml", *rest, "--out", out, "--mode", "sft")
    last = error.strip().splitlines()[-1]
    assert code == 2 and "became" in last and "is kept; lower the learning rate" in last
    kept = [path.name for path in (out / "training/adapted/lr-1e+30/checkpoints").iterdir() if path.is_dir()]
    assert len(kept) == 1 and f"after step {kept[0]} is kept" in last and not (out / "merged").exists()


# Terms that bring more of the source.

GENERATED = SHORT | {"max_texts": 12, "generation": {"texts": 10, "tokens": 24}, "distillation": {"steps": 2}}


@pytest.mark.slow
def test_distilled_on_generated_texts_through_python(texts, llama_dir, qwen2_dir, tmp_path) -> None:
    told = GENERATED | {"combine": ["distillation", "generated"], "mode": "combined", "valid": texts["valid"]}
    told |= {"training": SHORT["training"] | {"steps": [3, 6], "warmup": 1}}
    model, manifest = tmjax.adapt(
        target=qwen2_dir, source=llama_dir, texts=texts["calibration"], out=tmp_path / "run", **told
    )
    facts = manifest["training"]["adapted"]
    generated = read_texts(str(tmp_path / "run/generated/source.jsonl"))
    assert facts["terms"] == ["distillation", "generated"] and facts["texts"] == 12 + len(generated)
    assert 5 < len(generated) <= 10 and manifest["generated"]["source"]["kept"] == len(generated)
    assert [item["planned_steps"] for item in facts["tried"]] == [3, 6]
    shared = manifest["teacher"]["source-on-source"]
    assert facts["teacher_positions"] == shared["positions"] and 0.8 < shared["positions"] / shared["of"] <= 1
    assert 0.5 < shared["mass"] <= 1.0001
    with (tmp_path / "run/training/adapted/lr-0.0003-steps-6/log.csv").open(newline="") as stream:
        rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(stream)]
    weight = DistillationOptions().weight
    assert all(row["loss"] == pytest.approx(row["text"] + weight * row["teacher"], rel=1e-5) for row in rows)
    assert rows[-1]["teacher"] < rows[0]["teacher"]
    held = safetensors.numpy.load_file(tmp_path / "run/merged/model.safetensors")
    np.testing.assert_array_equal(held["model.norm.weight"], np.asarray(model.params["norm.weight"]))


@pytest.mark.slow
def test_all_terms_with_controls(flags, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(GENERATED | {"guidance": {"metric": "fisher"}}))
    out = tmp_path / "run"
    assert cli.run(["adapt", str(recipe), *flags, "--out", str(out), "--mode", "combined", "--controls"]) == 0
    manifest = read_manifest(out)
    controls = {"sft", "shuffled_rows", "random_source", "target_written"}
    arms = {"adapted", "source_written"} | {f"control:{name}" for name in controls}
    assert set(manifest["training"]) == arms and set(manifest["evaluation"]) == arms | {"target", "source"}
    counts = {arm: facts["texts"] for arm, facts in manifest["training"].items()}
    assert (
        counts["adapted"] == counts["source_written"] >= counts["control:target_written"] > counts["control:sft"] == 12
    )
    explained = {arm: facts.get("explained_at_start") for arm, facts in manifest["training"].items()}
    assert np.mean(explained["adapted"]) > np.mean(explained["control:shuffled_rows"])
    texts_by = {arm: facts["texts_by"] for arm, facts in manifest["training"].items()}
    assert texts_by["control:shuffled_rows"] == "target" and texts_by["control:random_source"] == "random_source"
    assert manifest["source_gain"]["best_control"] in manifest["evaluation"]


@pytest.mark.slow
def test_budget_is_planned_once_and_resumes(flags, short, tmp_path, capsys, monkeypatch) -> None:
    """The throughput (a given one) is recorded, and a second start reads the plan instead of measuring again."""
    rest = ["--out", tmp_path / "run", "--mode", "sft", "--budget", "2s", "--json"]
    monkeypatch.setattr(ArmTrainer, "tokens_per_second", lambda self: 15_000.0)
    code, out, error = run(capsys, short, *flags, *rest)
    assert code == 0, error
    first = json.loads(out)
    monkeypatch.setattr(ArmTrainer, "tokens_per_second", lambda self: 20_000.0)
    plan, facts = first["budget"], first["training"]["adapted"]
    assert plan["tokens"] == 12_000 and plan["tokens_per_second"] == 15_000
    lengths = [steps for count, steps in plan["rounds"] for _ in range(count)] + [plan["steps"]]
    assert [item["planned_steps"] for item in facts["tried"]] == lengths
    assert facts["valid_bits_per_byte"] == min(item["valid_bits_per_byte"] for item in facts["tried"])
    code, out, _ = run(capsys, short, *flags, *rest)
    again = json.loads(out)
    assert code == 0 and again["budget"] == plan and all(stage["reused"] for stage in again["stages"].values())
