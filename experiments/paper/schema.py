"""A recipe of the paper's kind: models, data, settings, evaluation tasks and published numbers, checked."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from tmjax.errors import InputError, summarise
from tmjax.recipes.base import read_recipe

HERE = Path(__file__).resolve().parent
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Where texts come from: a data set whose columns make a conversation or a text, or three local files.

    Rows are taken in order: `calibration` for alignment and adaptation, then `valid` and `test`, which nothing is
    trained on. `user` and `context` are joined as the question, `assistant` is the answer; `messages` holds whole
    conversations (role, content); `text` is plain text. Conversations are written in the target's chat format.
    """

    dataset: str | None = None
    split: str = "train"
    system: str | None = None
    user: str | None = None
    context: str | None = None
    assistant: str | None = None
    messages: str | None = None
    text: str | None = None
    instructions: str = ""
    calibration: Count | str = 2000
    valid: Count | str = 200
    test: Count | str = 200

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        named = (self.system, self.user, self.context, self.assistant, self.messages, self.text)
        return tuple(name for name in named if name is not None)


class Training(Section):
    """Adaptation: coefficient of what is transported, learning rate, epochs over the calibration rows."""

    alpha: Fraction
    learning_rate: Annotated[float, Field(gt=0)]
    epochs: Count = 1
    batch: Count = 8
    tokens: Count = 2048


class Task(Section):
    """A task of lm-eval with its metric, and the paper's accuracies (on its scale: 1 or 100).

    `small_adapted` is the paper's for a source of the target's size.
    """

    task: str
    metric: str = "acc"
    label: str
    scale: Literal[1, 100] = 100
    target: float | None = None
    fused: float | None = None
    adapted: float | None = None
    small_adapted: float | None = None


#: What `merge` may hold; everything else of a merge is the experiment's to say.
OwnSetting = Literal["activations", "alignment", "fusion", "evaluation", "dtype", "mesh"]


class PaperRecipe(Section):
    """One experiment. `sources` are further, for example same-size, ones; `alphas` the coefficients of the curve.

    The preset `paper` merges at `fuse_alpha`, ours at what validation texts choose, the curve at `alphas` (weights
    alone: at a fixed alpha nothing is solved for). Ours pair pieces of texts, hundreds in each, so they align on the
    first `span_texts`; `merge` are other settings of theirs, keys of a merge's recipe. Adaptation trains with the
    residual of `training.alpha`, after a merge that solves from its result and with its own. Tasks that lm-eval does
    not know lie in the folder `tasks_folder`, by default `tasks` here. `general` are tasks that a merge should not
    harm, `other_texts` files for the same purpose.
    """

    name: str
    target: str
    source: str
    sources: tuple[str, ...] = ()
    fuse_alpha: Fraction
    alphas: tuple[Fraction, ...] = (0.01, 0.03, 0.05, 0.1, 0.15)
    presets: tuple[Literal["paper", "barycentric", "quick", "predictions"], ...] = ("paper", "predictions")
    span_texts: Count = 40
    merge: Annotated[dict[OwnSetting, Any], Field(default_factory=dict)]
    training: Training
    data: Data
    chat_template: bool = True
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    tasks_folder: Path = HERE / "tasks"
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    general: tuple[str, ...] = ()
    other_texts: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0)] = 0
    limit: Count | None = None

    @property
    def task_names(self) -> list[str]:
        """All tasks that models are asked."""
        return list(dict.fromkeys([*(task.task for task in self.tasks), *self.general]))


def recipe_names() -> list[str]:
    """The recipes in this folder."""
    return sorted(file.stem for file in HERE.glob("*.yaml") if not file.stem.startswith("recorded"))


def recipe_file(name: str) -> Path:
    """The file of a recipe: a path, or a name in this folder; raises InputError if there is none."""
    file = Path(name)
    if file.suffix != ".yaml":
        file = HERE / f"{name}.yaml"
    if not file.is_file():
        raise InputError(f"no recipe {name}; known are {', '.join(recipe_names())}, or give a .yaml file")
    return file


def load_recipe(file: Path) -> PaperRecipe:
    """Reads and checks a recipe; raises InputError listing every fault on one line."""
    values: dict[str, Any] = read_recipe(file)
    try:
        recipe = PaperRecipe.model_validate(values)
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {_plain(fault)}" for fault in error.errors()]
        raise InputError(f"{file.name}: {summarise(faults)}") from None
    if recipe.data.dataset is not None and not recipe.data.columns:
        raise InputError(f"{file.name}: data names a data set but none of its columns")
    if recipe.data.dataset is None and not all(
        isinstance(value, str) for value in (recipe.data.calibration, recipe.data.valid, recipe.data.test)
    ):
        raise InputError(f"{file.name}: data needs a data set, or files as calibration, valid and test")
    return recipe


def _plain(fault: Any) -> str:
    told = {"extra_forbidden": "unknown key", "missing": "is missing"}
    return told.get(fault["type"], f"{fault['msg']}, not {fault['input']!r}")
