"""Recipes of the paper: the six pass the dry run, and each kind of mistake is one clear line."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tmjax.checkpoints.load import load_model
from tmjax.cli import run as run_cli
from tmjax.evaluate.bits import evaluate
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer
from tools.verse_tasks import write_choice_task

PAPER = Path(__file__).resolve().parents[2] / "experiments/paper"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The scripts of that folder import each other by name."""
    sys.path.insert(0, str(PAPER))
    yield
    sys.path.remove(str(PAPER))
    for name in ("schema", "check", "data", "tables", "experiment", "run"):
        sys.modules.pop(name, None)


def paper(*arguments: str) -> int:
    from run import app

    return run_cli(list(arguments), application=app, name="paper")


@pytest.mark.slow
def test_the_six_recipes_pass_the_dry_run(capsys):
    assert paper("--dry-run") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "GiB" in line]
    names = [line.split(":")[0] for line in lines]
    assert names == ["cantonese", "finance", "indonesian", "malay", "medical", "thai"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tasks": [{"task": "mmlu_anatomie", "label": "x"}]}, "not a task of lm-eval"),
        ({"data": {"dataset": "stvlynn/Cantonese-Dialogue", "user": "question"}}, "has no column question; it has"),
        ({"data": {"dataset": "nobody/nothing", "text": "text"}}, "nobody/nothing is not recorded"),
        ({"source": "unsloth/Llama-3.1-9B"}, "model unsloth/Llama-3.1-9B is not recorded"),
        ({"target": None}, "target: is missing"),
        ({"fuse_alpha": 1.5}, "fuse_alpha: Input should be less than or equal to 1, not 1.5"),
        ({"training": {"alpha": -0.1, "learning_rate": 1e-6}}, "training.alpha: Input should be greater than 0"),
        ({"alpha": 0.1}, "alpha: unknown key"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(change, told, tmp_path, capsys):
    values = yaml.safe_load((PAPER / "medical.yaml").read_text()) | change
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    assert paper(str(file), "--dry-run") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("paper: error:")]
    assert len(lines) == 1 and told in lines[0]


def test_published_numbers_and_settings_are_the_papers():
    from schema import load_recipe, recipe_names

    recipes = {name: load_recipe(PAPER / f"{name}.yaml") for name in recipe_names()}
    settings = {n: (r.fuse_alpha, r.training.alpha, r.training.learning_rate) for n, r in recipes.items()}
    assert settings == {
        "cantonese": (0.01, 0.1, 1e-8),
        "finance": (0.03, 0.03, 1e-6),
        "indonesian": (0.01, 0.1, 1e-6),
        "malay": (0.1, 0.1, 1e-6),
        "medical": (0.03, 0.005, 3e-7),
        "thai": (0.01, 0.01, 1e-7),
    }
    assert not [task.task for task in recipes["finance"].tasks if "fin" in task.task.lower()]
    assert [task.adapted for task in recipes["malay"].tasks] == [48.81, 41.68, 48.69, 46.58, 46.91]


def test_rows_become_conversations_in_the_models_format(qwen2_dir):
    from data import text_of
    from schema import Data

    tokenizer = load_tokenizer(qwen2_dir).fast
    data = Data(dataset="d", system="s", user="q", context="c", assistant="a", instructions="be kind")
    row = {"s": None, "q": "who?", "c": "here", "a": "I"}
    assert text_of(data, row, tokenizer) == "be kind\nwho?\n\nhere\nI"  # no chat format
    tokenizer.bos_token = "<|begin|>"
    tokenizer.chat_template = "<|begin|>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert text_of(data, row, tokenizer) == "[system]be kind[user]who?\n\nhere[assistant]I"
    assert text_of(data, row | {"a": " "}, tokenizer) == ""
    turns = Data(dataset="d", messages="m")
    told = {"m": [{"role": "user", "content": "x", "id": 1}, {"role": "assistant", "content": "y"}]}
    assert text_of(turns, told, tokenizer) == "[user]x[assistant]y"


def test_tables_are_in_the_papers_layout():
    """Published rows first, a point of the curve beside its shrunk twin, a source beside its size."""
    from experiment import Arm
    from schema import load_recipe
    from tables import paper_tables

    recipe = load_recipe(PAPER / "malay.yaml").model_copy(update={"alphas": (0.1,), "presets": ("paper",)})

    def result(score: float) -> dict:
        scores = {task.task: {"acc": score, "acc_stderr": 0.01} for task in recipe.tasks}
        return {"evaluation": {"bits_per_byte": 2 - score}, "tasks": {"results": scores}}

    arms = [Arm("target", "target", "t"), Arm("source", "source", "s", source=recipe.source)]
    arms += [Arm(f"c{e}", "curve", "c", "paper", recipe.source, alpha=0.1, empty=e) for e in (False, True)]
    told = paper_tables(recipe, [(arm, result(0.4 + 0.1 * n)) for n, arm in enumerate(arms)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("|")]
    assert rows[2] == ["paper: target", "42.3", "38.37", "44.5", "42.61", "40.92", ""]
    assert rows[5] == ["target", *["40.00 ± 1.00"] * 5, "1.6000"]
    assert ["paper", "0.1", "1.3000", *["60.00 ± 1.00"] * 5, "1.4000"] in rows
    assert ["paper: same size", "", "adapted", "47.65", "41.76", "47.97", "46.05", "46", ""] in rows
    assert ["target", *[""] * 5] == rows[-2] and rows[-4][:2] == ["accuracy", "winogrande"]


@pytest.mark.slow
@pytest.mark.parametrize("language", ["swahili", "wolof"])
def test_the_runner_runs_a_bundled_pair(language, repo, tmp_path, capsys):
    """The recipe of the repository with few texts, one preset (ours), one more source, one alpha; then again."""
    (tmp_path / "tasks").mkdir()
    task = write_choice_task(tmp_path / "tasks", 24, language=language)
    values = yaml.safe_load((repo / f"experiments/{language}/paper.yaml").read_text())
    for part, count in (("calibration", 24), ("valid", 12), ("test", 20)):
        lines = (repo / values["data"][part]).read_text().splitlines()[:count]
        values["data"][part] = str(tmp_path / f"{part}.jsonl")
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    values |= {name: str(repo / values[name]) for name in ("target", "source")}
    values |= {
        "sources": [str(repo / values["sources"][0])],
        "alphas": [0.05],
        "presets": ["predictions"],
        "merge": {
            "operators": [{"transport": {}}, {"predictions": {"generated_texts": 12, "rounds": 2, "tokens": 24}}]
        },
        "tasks": [{"task": task, "label": "Verses", "target": 40.0}],
        "tasks_folder": str(tmp_path / "tasks"),
        "general": [task],
        "other_texts": [values["data"]["valid"]],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    command = [str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out")]
    assert paper(*command) == 0
    folder = tmp_path / "out" / language
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    named = [row[0] for row in rows]
    assert named[2:6] == ["paper: target", "target", "source", "predictions, fused"]
    assert {"target, trained (no source)", "predictions-shrink", "predictions-adapted-random_source"} <= set(named)
    results = json.loads((folder / "results.json").read_text())
    held = evaluate(load_model(values["target"]), read_texts(values["data"]["test"])).bits_per_byte
    assert results["target"]["evaluation"]["bits_per_byte"] == pytest.approx(held, rel=1e-6)
    point = evaluate(load_model(folder / "curve/predictions-alpha-0.05"), read_texts(values["data"]["test"]))
    assert ["predictions", "0.05"] in [row[:2] for row in rows]
    assert f"{point.bits_per_byte:.4f}" in next(row for row in rows if row[:2] == ["predictions", "0.05"])[3:]
    # Nothing of the source in the shrunk twin: what the curve compares with.
    assert results["predictions-alpha-0.05"]["evaluation"] != results["predictions-alpha-0.05-shrink"]["evaluation"]
    assert (folder / "alpha.png").read_bytes().startswith(b"\x89PNG")
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert paper(*command) == 0
    assert made == {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert (folder / "table.md").read_text() == table
