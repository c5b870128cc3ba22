"""Recipes of the paper: the six pass the dry run, and each kind of mistake is one clear line."""

import sys
from pathlib import Path

import pytest
import yaml

from tmjax.cli import run as run_cli
from tmjax.hub.tokenizer import load_tokenizer
from tools.verse_tasks import write_choice_task

PAPER = Path(__file__).resolve().parent.parent / "experiments/paper"
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
    for name in ("schema", "check", "data", "tables", "run"):
        sys.modules.pop(name, None)


def paper(*arguments: str) -> int:
    from run import app

    return run_cli(list(arguments), application=app, name="paper")


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


@pytest.mark.slow
def test_the_runner_runs_the_bundled_pair(repo, texts, llama_dir, qwen2_dir, tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    task = write_choice_task(tmp_path / "tasks", 24)
    values = {
        "name": "swahili",
        "target": str(qwen2_dir),
        "source": str(llama_dir),
        "fuse_alpha": 0.1,
        "alphas": [0.05],
        "presets": ["barycentric"],
        "training": {"alpha": 0.1, "learning_rate": 1e-4},
        "data": {part: texts[part] for part in ("calibration", "valid", "test")},
        "chat_template": False,
        "tasks": [{"task": task, "label": "Verses", "target": 40.0}],
        "tasks_folder": str(tmp_path / "tasks"),
    }
    (tmp_path / "swahili.yaml").write_text(yaml.safe_dump(values))
    assert paper(str(tmp_path / "swahili.yaml"), "--out", str(tmp_path / "out")) == 0
    table = (tmp_path / "out/swahili/table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert rows[:4] == ["paper: target", "target", "source", "barycentric"]
    assert "barycentric, control:shrink" in rows and "barycentric, alpha 0.05" in rows
