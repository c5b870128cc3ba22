"""`experiments/transfer`: what the study reads back from its tables, and which recipes it makes of its settings."""

import json
import subprocess
import sys

import pytest

from tmjax.recipes.base import read_recipe
from tmjax.transfer.recipe import build_recipe
from tools.script import script

TEXT = """# Study

## One pair

| setting | texts | seed | target | merged | best control | gain due to the source [95%] | of the gap |
|---|---|---|---|---|---|---|---|
| plain | 30 | 0 | 1.9 | 1.8 | 1.8 (shrink) | -0.0003 [-0.0013, +0.0008] | -0.1% |
| plain | 300 | 0 | 1.9 | 1.8 | 1.8 (shrink) | +0.0010 [+0.0002, +0.0018] | 0.3% |
| plain | 300 | all 3 | 1.9 | 1.8 | 1.8 (shrink) | +0.0012 [+0.0003, +0.0020] | 0.3% |
| mlp only | 300 | 0 | | | | fusion.roles: no | |

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
        for name, setting in study.SETTINGS.items():
            change = {} if callable(setting) else setting
            told = build_recipe(study.nested(read_recipe(recipe) | {"preset": "barycentric"}, change), base=repo)
            roles = study.fitting(told).fusion.roles
            if name.startswith("lexical, predictions"):
                given = {"source": "-", "target": "-", "texts": "-", "out": "-"}
                preset = {} if name.endswith("longer") else {"preset": "quick"}
                assert told.fusion == build_recipe(given | preset).fusion
            # The Wolof model's MLP has no gate.
            assert name != "mlp only" or roles == (("gate", "up", "down") if pair == "swahili" else ("up", "down"))


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


def test_an_interrupt_is_one_line_that_says_how_to_go_on(capsys) -> None:
    for resumes, said in ((True, "interrupted; the same command resumes"), (False, "interrupted")):
        with pytest.raises(SystemExit) as ended, script("study", resumes=resumes):
            raise KeyboardInterrupt
        assert ended.value.code == 130 and capsys.readouterr().err == f"study: error: {said}\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["figures.py", "nowhere.md", "--out", "x.png"], "figures: error: cannot read nowhere.md"),
        (["figures.py", "LICENSE", "--out", "x.png"], "figures: error: there is no table of the study"),
        (["study.py", "nowhere.yaml", "--out", "{out}"], "study: error: cannot read recipe nowhere.yaml"),
        (["../adaptation/study.py", "nowhere.yaml", "--out", "{out}"], "study: error: cannot read recipe nowhere.yaml"),
    ],
)
def test_a_wrong_path_is_one_line(command, said, repo, tmp_path) -> None:
    script, *rest = command
    told = [sys.executable, str(repo / "experiments/transfer" / script), *(x.format(out=tmp_path) for x in rest)]
    done = subprocess.run(told, cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
