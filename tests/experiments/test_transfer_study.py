"""`experiments/transfer`: what the study reads back from its tables, and which recipes it makes of its settings."""

import json
import subprocess
import sys

import pytest
import yaml

from tmjax.recipes.base import read_recipe
from tmjax.transfer.controls import CONTROLS
from tmjax.transfer.operator import find_operator
from tmjax.transfer.recipe import build_recipe
from tools.script import script

TEXT = """# Study

## One pair

| setting | texts | seed | target | merged | best control | gain due to the source [95%] | of the gap |
|---|---|---|---|---|---|---|---|
| plain | 30 | 0 | 1.9 | 1.8 | 1.8 (shrink) | -0.0003 [-0.0013, +0.0008] | -0.1% |
| plain | 300 | 0 | 1.9 | 1.8 | 1.8 (shrink) | +0.0010 [+0.0002, +0.0018] | 0.3% |
| plain | 300 | all 3 | 1.9 | 1.8 | 1.8 (shrink) | +0.0012 [+0.0003, +0.0020] | 0.3% |
| mlp only | 300 | 0 | | | | roles: no | |

Words | with | bars.

## The other

| setting | texts | seed | target | merged | best control | gain due to the source [95%] | of the gap |
|---|---|---|---|---|---|---|---|
| heads | 300 | 0 | 1.9 | 1.8 | 1.8 (shrink) | -0.0000 [-0.0008, +0.0008] | -0.0% |
"""


@pytest.fixture(scope="module")
def modules(repo):
    """The folder's own modules, which import each other by name."""
    before = list(sys.path)
    sys.path.insert(0, str(repo / "experiments/transfer"))
    import figures
    import study

    yield figures, study
    sys.path[:] = before


def test_tables_are_read_back(modules) -> None:
    figures, _ = modules
    one, other = figures.tables(TEXT)
    assert one == ("One pair", [("plain", 30, -0.0003, -0.0013, 0.0008), ("plain", 300, 0.0012, 0.0003, 0.002)])
    assert other == ("The other", [("heads", 300, -0.0, -0.0008, 0.0008)])
    assert figures.figure(TEXT).startswith(b"\x89PNG")


def test_the_readme_holds_tables_of_both_pairs(modules, repo) -> None:
    figures, study = modules
    found = figures.tables((repo / "experiments/transfer/README.md").read_text(encoding="utf-8"))
    assert len(found) == 2
    for _, rows in found:
        assert rows and {row.name for row in rows} <= set(study.SETTINGS)
        assert all(row.low <= row.value <= row.high for row in rows)


def test_every_setting_is_a_recipe_of_both_pairs(modules, repo) -> None:
    _, study = modules
    for pair in ("swahili", "wolof"):
        recipe = repo / f"experiments/{pair}/recipe.yaml"
        for name, change in study.SETTINGS.items():
            base = study.nested(read_recipe(recipe) | {"preset": "barycentric"}, change)
            setting = build_recipe(base, base=recipe.parent)
            fitted = build_recipe(study.fitting(setting).model_dump(mode="json")).operators
            if name.startswith("lexical, predictions"):
                given = {"source": "-", "target": "-", "texts": "-", "out": "-"}
                preset = {} if name.endswith("longer") else {"preset": "quick"}
                assert setting.operators == build_recipe(given | preset).operators
            # The Wolof model's MLP has no gate.
            own = ["gate", "up", "down"] if pair == "swahili" else ["up", "down"]
            assert name != "mlp only" or fitted[0]["transport"]["roles"] == own
            assert name == "mlp only" or fitted == setting.operators


def test_what_failed_is_tried_again_and_what_is_finished_is_not(modules, tmp_path) -> None:
    _, study = modules
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("source: nowhere\ntarget: nowhere\ntexts: none.txt\nout: unused\n", encoding="utf-8")
    out, done = tmp_path / "plain-0", tmp_path / "plain-0.json"
    failed = study.measure("plain", recipe, out, 0, 300)
    assert "nowhere" in failed["error"] and json.loads(done.read_text()) == failed
    done.write_text(json.dumps(failed | {"error": "of another day"}))
    assert study.measure("plain", recipe, out, 0, 300) == failed
    finished = {key: value for key, value in failed.items() if key != "error"} | {"evaluation": {}}
    done.write_text(json.dumps(finished))
    assert study.measure("plain", recipe, out, 0, 300) == finished


@pytest.mark.slow
def test_the_transplant_is_an_operator_of_its_own_file_with_all_controls(modules, texts, repo, tmp_path) -> None:
    """What the source contributes nothing to is solved for the target's own units, with as many trials."""
    _, study = modules
    recipe = tmp_path / "recipe.yaml"
    values = {"source": repo / "experiments/swahili/source", "target": repo / "experiments/swahili/target"}
    values |= {"texts": texts["calibration"], "valid": texts["valid"], "test": texts["test"], "out": "unused"}
    options = {"self_source": False, "mesh": "data=1", "evaluation": {"draws": 100}}
    recipe.write_text(yaml.safe_dump({key: str(value) for key, value in values.items()} | options))
    ((name, _),) = study.SETTINGS["unit transplant"]["operators"][0].items()
    assert find_operator(name).name == "unit_transplant" and find_operator(name).needs == {"features"}
    facts = study.measure("unit transplant", recipe, tmp_path / "run", 0, 24)
    assert "error" not in facts and {"merged", *CONTROLS} <= set(facts["evaluation"])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    chosen = manifest["operators"]["unit_transplant"]
    assert chosen["trials"] == 16 and chosen["chosen"] == {"units": 1, "step": 0.3}
    assert chosen["valid_bits_per_byte"][1] == pytest.approx(2.161698, abs=1e-4)
    assert all(manifest["controls"][arm]["operators"]["unit_transplant"]["trials"] == 16 for arm in CONTROLS)
    bits = {arm: item["bits_per_byte"] for arm, item in facts["evaluation"].items()}
    assert len({bits[arm] for arm in ("merged", "control:shuffled_rows", "target")}) == 3
    assert bits["control:permuted_plan"] != bits["merged"]
    row = next(iter(manifest["update"].values()))
    assert row["unit_transplant"] == pytest.approx(row["effective_update"]) and row["source_part"] > 0


def test_an_interrupt_is_one_line_that_says_how_to_go_on(capsys) -> None:
    for resumes, said in ((True, "interrupted; the same command resumes"), (False, "interrupted")):
        with pytest.raises(SystemExit) as ended, script("study", resumes=resumes):
            raise KeyboardInterrupt
        assert ended.value.code == 130 and capsys.readouterr().err == f"study: error: {said}\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["figures.py", "nowhere.md", "--out", "x.png"], "figures: error: cannot read nowhere.md"),
        pytest.param(
            ["figures.py", "LICENSE", "--out", "x.png"],
            "figures: error: there is no table of the study",
            marks=pytest.mark.slow,
        ),
        (["study.py", "nowhere.yaml", "--out", "{out}"], "study: error: cannot read recipe nowhere.yaml"),
        pytest.param(
            ["../adaptation/study.py", "nowhere.yaml", "--out", "{out}"],
            "study: error: cannot read recipe nowhere.yaml",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wrong_path_is_one_line(command, said, repo, tmp_path) -> None:
    script, *rest = command
    told = [sys.executable, str(repo / "experiments/transfer" / script), *(x.format(out=tmp_path) for x in rest)]
    done = subprocess.run(told, cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
