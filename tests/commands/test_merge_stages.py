"""Stages of a merge: nothing is recorded or aligned that no operator needs, and rows are chosen to a budget."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tmjax import cli
from tmjax.activations import store
from tmjax.align.sizes import SITE_ENTRIES, Sites, row_budget
from tmjax.recipes.merge import ActivationOptions


def run(command: str, recipe_file, folder: Path, small_flags: list[str], **changes) -> dict:
    recipe = yaml.safe_load(Path(recipe_file).read_text()) | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.run([command, str(folder / "recipe.yaml"), *small_flags, "--out", str(folder / "run")]) == 0
    return json.loads((folder / "run/manifest.json").read_text())


def test_a_chain_that_needs_no_alignment_makes_none(recipe_file, small_flags, tmp_path, capsys) -> None:
    operators = [
        {"embeddings": {"alphas": [0.1], "kappas": [300.0]}},
        {"predictions": {"rounds": 1, "generated_texts": 0, "scope": "readout"}},
    ]
    # Of the solver nothing runs: with this memory an alignment would be refused.
    changes = {"preset": "predictions", "operators": operators, "alignment": {"memory_mib": 1}}
    manifest = run("merge", recipe_file, tmp_path, small_flags, **changes, activations={"max_texts": 8})
    stages = {name.partition(":")[0] for name in manifest["stages"]}
    assert stages == {"edges", "teacher", "fuse", "evaluate", "samples", "card", "report", "provenance"}
    assert not manifest["alignment"] and not manifest.get("rows")
    assert not any((tmp_path / "run" / name).exists() for name in ("activations", "alignment", "moments"))
    capsys.readouterr()
    assert cli.run(["doctor", str(tmp_path / "recipe.yaml"), *small_flags[:6], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["memory"]["sites"] == {} and not any("align" in name for name in report["memory"]["stages"])


@pytest.mark.slow
def test_rows_are_chosen_to_a_budget_and_the_manifest_says_so(recipe_file, small_flags, tmp_path) -> None:
    manifest = run("align", recipe_file, tmp_path, small_flags, activations={"max_rows": 40})
    rows = manifest["rows"]
    assert rows["rows"] == 40 and rows["shared"] > 100 and rows["documents"] == 24
    target, source = (store.read(tmp_path / "run/activations" / name) for name in ("target", "source"))
    target.rows.require_same(source.rows)
    assert len(target.rows) == 40 and len(np.unique(target.rows.document)) > 12


@pytest.mark.parametrize("keep", [True, False])
def test_the_default_budget_lets_the_largest_site_fit(keep) -> None:
    sites = Sites({"resid": (2048, 4096), "mlp_hidden": (8192, 14336)}, ("resid", "mlp_hidden"))
    options = ActivationOptions(keep=keep)
    limit = row_budget(sites, (16, 32), options)
    if not keep:
        assert limit is None
        return
    entries = 16 * 8192 + 32 * 14336
    assert limit * entries <= SITE_ENTRIES < (limit + 1) * entries
    assert row_budget(replace(sites, units={}), (16, 32), options) is None
    assert row_budget(sites, (16, 32), ActivationOptions(keep=keep, max_rows=7)) == 7
