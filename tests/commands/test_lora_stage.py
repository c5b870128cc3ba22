"""`export: {lora: RANK}`: a finished run goes on with it, and PEFT reads matrices of the errors in the manifest."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file

from tmjax import cli
from tmjax.commands.lora_stage import require_exportable
from tmjax.errors import InputError
from tmjax.recipes.base import ExportOptions

# Of PEFT and transformers about each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
RANK = 8


@pytest.fixture(scope="module")
def with_lora(plain, recipe_file, flags, tmp_path_factory) -> tuple[Path, dict]:
    """A finished run whose command is given again with a LoRA."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(plain, folder / "run", copy_function=shutil.copy2)
    recipe = yaml.safe_load(Path(recipe_file).read_text()) | {"export": {"lora": RANK}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.run(["merge", str(folder / "recipe.yaml"), *flags, "--out", str(folder / "run")]) == 0
    return folder / "run", json.loads((folder / "run/manifest.json").read_text())


def test_only_what_shows_it_is_made_again(with_lora, plain) -> None:
    run, manifest = with_lora
    new = {name for name, stage in manifest["stages"].items() if not stage["reused"]}
    assert new == {"lora", "card", "report", "provenance"}
    assert manifest["key"] == json.loads((plain / "manifest.json").read_text())["key"]
    assert {path.name for path in (run / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_peft_has_the_errors_of_the_manifest(with_lora, qwen2_dir) -> None:
    run, manifest = with_lora
    facts = manifest["lora"]
    assert facts["rank"] == RANK and json.loads((run / "lora/adapter_config.json").read_text())["r"] == RANK
    plain = transformers.AutoModelForCausalLM.from_pretrained(qwen2_dir, dtype=torch.float32)
    folded = peft.PeftModel.from_pretrained(plain, run / "lora").merge_and_unload().state_dict()
    before, after = (load_file(folder / "model.safetensors") for folder in (qwen2_dir, run / "merged"))
    changed = set()
    for name, error in facts["errors"].items():
        change = after[name].astype(np.float64) - before[name]
        if change.any():
            changed.add(name)
            values = np.linalg.svd(change, compute_uv=False)
            assert error == pytest.approx(np.sqrt(np.sum(values[RANK:] ** 2) / np.sum(values**2)), abs=1e-6)
            rest = np.linalg.norm(after[name] - folded[name].numpy()) / np.linalg.norm(change)
            assert rest == pytest.approx(error, abs=1e-4)
    assert changed == set(manifest["update"])
    assert set(facts["left_out"]) == {name for name in before if (after[name] != before[name]).any()} - changed


def test_report_and_card_show_it(with_lora) -> None:
    run, manifest = with_lora
    page, card = (run / "report.html").read_text(), (run / "merged/README.md").read_text()
    name, error = next(iter(manifest["lora"]["errors"].items()))
    assert '<table id="lora"' in page and f"<td>{name}</td><td>{error:.3g}</td>" in page
    assert f"The change as a LoRA of rank {RANK}" in card and "other tensors changed too" in card


def test_a_target_that_peft_does_not_adapt_is_refused(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    require_exportable(ExportOptions(), "a", str(tmp_path))
    with pytest.raises(InputError, match="the target a is an adapter itself; write it as a model first"):
        require_exportable(ExportOptions(lora=4), "a", str(tmp_path))
    (tmp_path / "tmjax.json").write_text("{}")
    with pytest.raises(InputError, match="the target a is an orbax checkpoint"):
        require_exportable(ExportOptions(lora=4), "a", str(tmp_path))
