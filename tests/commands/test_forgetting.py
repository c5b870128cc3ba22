"""`--other-texts`: what a merge costs on other texts, in the manifest, the summary and the report."""

import json

import numpy as np
import pytest

from tmjax import cli
from tmjax.checkpoints.load import load_model
from tmjax.commands.forgetting import forgetting_facts
from tmjax.evaluate.bits import Scores, evaluate
from tmjax.text.documents import read_texts


def test_the_change_is_paired():
    generator = np.random.default_rng(0)
    size = generator.integers(40, 90, 200)
    nll = size * generator.uniform(0.5, 2, 200)
    before, after = (Scores(values, size, size) for values in (nll, nll + 0.02 * size))
    facts = forgetting_facts(before, after, arm="merged", draws=500, seed=0)
    assert facts["change"]["bits_per_byte"] == pytest.approx(0.02 / np.log(2))
    np.testing.assert_allclose(facts["change"]["ci95"], 0.02 / np.log(2), rtol=1e-6)  # far less than either varies


@pytest.mark.slow
def test_other_texts_before_and_after(repo, flags, recipe_file, tmp_path, capsys):
    wolof = (repo / "experiments/wolof/texts/wolof.test.jsonl").read_text().splitlines()[:15]
    (tmp_path / "wolof.jsonl").write_text("\n".join(wolof) + "\n")
    other, test, out = str(tmp_path / "wolof.jsonl"), flags[flags.index("--test") + 1], str(tmp_path / "run")
    command = ["merge", recipe_file, *flags, "--alpha", "0.1", "--out", out, "--other-texts", other]
    assert cli.run([*command, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    facts, target = manifest["forgetting"][other], flags[flags.index("--target") + 1]
    texts = read_texts(other)
    assert facts["documents"] == 15
    assert facts["target"] == pytest.approx(evaluate(load_model(target), texts).bits_per_byte, rel=1e-6)
    assert facts["merged"] == pytest.approx(evaluate(load_model(f"{out}/merged"), texts).bits_per_byte, rel=1e-6)
    assert facts["change"]["bits_per_byte"] == pytest.approx(facts["merged"] - facts["target"])
    assert "Bits per byte on other texts" in (tmp_path / "run/report.html").read_text()
    # Further texts leave what is finished alone.
    assert cli.run([*command, "--other-texts", test]) == 0
    assert "Bits per byte on other texts" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert set(manifest["forgetting"]) == {other, test}
    assert manifest["stages"]["fuse"]["reused"] and not manifest["stages"]["forgetting"]["reused"]
    assert manifest["forgetting"][test]["merged"] == pytest.approx(manifest["evaluation"]["merged"]["bits_per_byte"])
    assert cli.run([*command[:-1], str(tmp_path / "none.txt")]) == 2
    assert "cannot read texts" in capsys.readouterr().err


def test_an_adaptation_says_what_it_cost_elsewhere(flags, texts, tmp_path, capsys):
    """Plain training for a few steps; as in a merge, further texts do not train again."""
    models = ["--target", flags[flags.index("--target") + 1], "--texts", texts["calibration"]]
    recipe, out = tmp_path / "recipe.yaml", str(tmp_path / "run")
    training = {"steps": 3, "warmup": 1, "tokens_per_step": 512, "row_lengths": 1, "lr": 1e-3}
    recipe.write_text(json.dumps({"mode": "sft", "mesh": "data=1", "max_texts": 8, "training": training}))
    command = ["adapt", str(recipe), *models, "--out", out, "--other-texts", texts["valid"]]
    assert cli.run([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["forgetting"][texts["valid"]]
    held, after = read_texts(texts["valid"]), load_model(f"{out}/merged")
    assert facts["target"] == pytest.approx(evaluate(load_model(models[1]), held).bits_per_byte, rel=1e-6)
    assert facts["adapted"] == pytest.approx(evaluate(after, held).bits_per_byte, rel=1e-6)
    assert facts["adapted"] != facts["target"] and facts["documents"] == len(held)
    assert cli.run([*command, "--other-texts", texts["test"]]) == 0
    assert "Bits per byte on other texts" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert set(manifest["forgetting"]) == {texts["valid"], texts["test"]}
    assert manifest["stages"]["train:adapted"]["reused"] and not manifest["stages"]["forgetting"]["reused"]
    for file in ("report.html", "merged/README.md"):
        assert texts["test"] in (tmp_path / "run" / file).read_text()
    assert cli.run([*command[:-1], str(tmp_path / "none.txt")]) == 2
    assert "cannot read texts" in capsys.readouterr().err
