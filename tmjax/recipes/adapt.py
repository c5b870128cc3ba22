"""The recipe of an adaptation as one frozen, checked object. Files have the keys of the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tmjax.errors import InputError
from tmjax.recipes.base import (
    Alpha,
    EvaluationOptions,
    ExportOptions,
    Placed,
    Positive,
    PositiveFloat,
    Section,
    checked,
    found_near,
)
from tmjax.recipes.merge import Recipe
from tmjax.recipes.objectives import (
    DistillationOptions,
    GenerationOptions,
    GuidanceOptions,
    LoraOptions,
    ResidualOptions,
)
from tmjax.recipes.sources import SOURCE, MixingKey, SourceEntry, by_key, require_different, with_mixing
from tmjax.recipes.steps_recipe import refuse_steps

NotNegative = Annotated[float, Field(ge=0)]
#: Modes without terms that need a source.
WITH_SOURCE = ("residual-frozen",)
Term = Literal["guidance", "distillation", "generated"]
#: Terms of the loss, and further texts, that each mode adds to next-token training on the given texts.
TERMS: dict[str, tuple[Term, ...]] = {
    "guided": ("guidance",),
    "distilled": ("distillation",),
    "source-written": ("generated",),
    "combined": ("guidance", "distillation", "generated"),
}
#: Objectives of the mode `combined` that several sources have together.
SEVERAL: tuple[Term, ...] = ("distillation", "generated")
#: Settings of `training` that are chosen on validation texts, and their defaults where there are none.
WITHOUT_VALID: dict[str, Any] = {"steps": [300], "lr": [1e-3], "patience": None}
#: Settings that a budget decides.
DECIDED: dict[str, tuple[str, ...]] = {
    "training": ("steps", "lr", "tokens_per_step", "accumulate", "average"),
    "generation": ("texts",),
}
#: Former keys and their present names.
RENAMED = {"written": "generation", "distillation.least": "distillation.min_probability"}


class TrainingOptions(Section):
    """Optimiser (AdamW), schedule, validation and checkpoints of a training.

    Every arm is trained with each pair of `steps` and `lr`, and validation texts choose one. The best parameters on
    them are kept. Without validation texts the defaults are 300 steps, a learning rate of 1e-3 and no early stop.
    """

    steps: Annotated[tuple[Positive, ...], Field(min_length=1, description="Numbers of updates that are tried.")] = (
        40,
        300,
    )
    lr: Annotated[
        tuple[PositiveFloat, ...], Field(min_length=1, description="Largest learning rates that are tried.")
    ] = (3e-4, 1e-3, 3e-3)
    warmup: Annotated[
        int,
        Field(ge=0, description="Steps over which the learning rate rises linearly; it then falls along a cosine."),
    ] = 10
    final_lr: Annotated[
        NotNegative, Field(description="Learning rate of the last step, relative to the largest one.")
    ] = 0.1
    weight_decay: Annotated[NotNegative, Field(description="Decay of matrices (not of norms and biases).")] = 0.1
    clip: Annotated[PositiveFloat, Field(description="Largest global norm of the gradient.")] = 1.0
    b1: Annotated[NotNegative, Field(description="Decay of Adam's first moment.")] = 0.9
    b2: Annotated[NotNegative, Field(description="Decay of Adam's second moment.")] = 0.95
    eps: Annotated[PositiveFloat, Field(description="Adam's epsilon.")] = 1e-8
    tokens_per_step: Annotated[Positive, Field(description="Largest number of tokens of a batch.")] = 2048
    accumulate: Annotated[Positive, Field(description="Batches per update.")] = 1
    row_lengths: Annotated[
        Positive, Field(description="Largest number of row lengths; each is compiled once, and more of them pad less.")
    ] = 4
    remat: Annotated[
        bool,
        Field(description="Whether only the residual stream between blocks is stored for the backward pass."),
    ] = False
    unroll: Annotated[
        Positive,
        Field(description="Layers per turn of the loop over them; more take longer to compile and run faster."),
    ] = 4
    anneal: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Weights of guidance and distillation fall along a cosine to this part of themselves.",
        ),
    ] = 1.0
    average: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Decay per step of a moving average of the parameters, which is validated beside them; the "
            "better of the two is kept. 0: none.",
        ),
    ] = 0.0
    validate_every: Annotated[Positive, Field(description="Steps between validations.")] = 10
    patience: Annotated[
        Positive | None,
        Field(description="Validations in a row without a better one that end the training; null: never."),
    ] = 15
    keep_every: Annotated[Positive, Field(description="Steps between checkpoints of the training.")] = 100
    keep: Annotated[Positive, Field(description="Newest checkpoints of the training that are kept.")] = 2

    @property
    def schedules(self) -> list[tuple[int, float]]:
        """All pairs (steps, learning rate) that an arm is trained with."""
        return [(steps, lr) for steps in self.steps for lr in self.lr]


class AdaptRecipe(Placed):
    """A whole adaptation. Model names are directories or hub ids; texts are files or `hf:NAME[:split[:field]]`."""

    source: Annotated[
        str | None, Field(description="Source checkpoint, for modes that have one; of a run its source unless given.")
    ] = None
    sources: Annotated[
        tuple[SourceEntry, ...],
        Field(description="Several sources in place of `source`: names, or entries `{source: NAME, weight: W}`."),
    ] = ()
    mixing: MixingKey = "prediction"
    target: Annotated[
        str, Field(description="Target checkpoint, or a run of `tmjax merge` whose target and source are meant.")
    ]
    texts: Annotated[str, Field(description="Training texts, or dialogues.")]
    valid: Annotated[str | None, Field(description="Texts on which schedules and the best parameters are chosen.")] = (
        None
    )
    test: Annotated[str | None, Field(description="Texts on which the result is measured, once.")] = None
    other_texts: Annotated[
        tuple[str, ...],
        Field(description="Texts of other languages or domains, on which target and result are scored too."),
    ] = ()
    out: Annotated[str, Field(description="Run directory.")]
    mode: Annotated[
        Literal["sft", "residual-frozen", "guided", "distilled", "source-written", "combined", "lora"],
        Field(description="Objectives beside the next tokens of the training texts; see the page on adaptation."),
    ] = "combined"
    combine: Annotated[
        tuple[Term, ...],
        Field(
            min_length=1,
            description="Objectives of the mode `combined`; of several sources all but `guidance` unless given.",
        ),
    ] = TERMS["combined"]
    init: Annotated[
        Literal["target", "merged"] | None,
        Field(
            description="Model at which training begins: the target, or the merged model. Unless given, `merged` for "
            "the mode `residual-frozen` and `target` for all others."
        ),
    ] = None
    alpha: Annotated[
        Alpha | None, Field(description="Coefficient of transported weights; that of the merge unless given.")
    ] = None
    controls: Annotated[bool, Field(description="Whether every control arm is run too.")] = False
    seed: Annotated[int, Field(ge=0, description="Seed of everything random.")] = 0
    mesh: Annotated[str | None, Field(description="Device mesh; chosen over all devices unless given.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(
            description="Dtype that forward and backward passes compute in; auto: bfloat16 on accelerators, float32 on "
            "a CPU."
        ),
    ] = "auto"
    max_texts: Annotated[
        Positive | None, Field(description="Largest number of training texts that are read; all unless given.")
    ] = None
    max_tokens: Annotated[
        int, Field(ge=2, description="Longer documents are cut into pieces that predict so many tokens.")
    ] = 512
    budget: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9]+([.][0-9]+)?[smh]$",
            description="Time for the adapted model, such as 30m: learning rate, steps, batch, number of generated "
            "texts and moving average follow from it and from validation texts. Controls get the same training tokens.",
        ),
    ] = None
    tokens: Annotated[
        Positive | None, Field(description="The same in training tokens of an arm, instead of a time.")
    ] = None
    training: Annotated[TrainingOptions, Field(description="Optimiser, schedule, validation, checkpoints.")] = (
        TrainingOptions()
    )
    guidance: Annotated[GuidanceOptions, Field(description="Settings of the objective `guidance`.")] = GuidanceOptions()
    distillation: Annotated[DistillationOptions, Field(description="Settings of the objective `distillation`.")] = (
        DistillationOptions()
    )
    generation: Annotated[GenerationOptions, Field(description="Settings of texts that the source generates.")] = (
        GenerationOptions()
    )
    residual: Annotated[ResidualOptions, Field(description="Settings of the mode `residual-frozen`.")] = (
        ResidualOptions()
    )
    lora: Annotated[LoraOptions, Field(description="Settings of the mode `lora`.")] = LoraOptions()
    merge: Annotated[
        dict[str, Any],
        Field(
            default_factory=dict,
            description="Settings of a merge's recipe (preset `barycentric` by default), for modes that need a merge "
            "and a target that is not a run.",
        ),
    ]
    evaluation: Annotated[EvaluationOptions, Field(description="Scoring.")] = EvaluationOptions()
    export: Annotated[ExportOptions, Field(description="Writing of the adapted checkpoint.")] = ExportOptions()
    places: Annotated[
        dict[str, str],
        Field(
            default_factory=dict, description="Written with a run: absolute places of its local inputs, by their names."
        ),
    ]

    @property
    def named_sources(self) -> dict[str, SourceEntry]:
        """The sources by their names in stages, inputs and arms."""
        if self.sources:
            return by_key(self.sources)
        return {} if self.source is None else {SOURCE: SourceEntry(source=self.source)}

    def inputs(self) -> dict[str, str]:
        """Returns the names of all inputs, by their keys; several sources are among them."""
        return super().inputs() | {name: entry.source for name, entry in by_key(self.sources).items()}

    @property
    def terms(self) -> frozenset[str]:
        """Terms that are added to next-token training on the given texts."""
        return frozenset(self.combine if self.mode == "combined" else TERMS.get(self.mode, ()))

    @property
    def budgeted(self) -> bool:
        """Whether schedules follow from a budget."""
        return self.budget is not None or self.tokens is not None

    @property
    def start(self) -> str:
        """The model at which training begins."""
        return self.init or ("merged" if self.mode == "residual-frozen" else "target")

    @property
    def merges(self) -> bool:
        """Whether a merge is needed."""
        return self.mode == "residual-frozen" or self.start == "merged"


def is_adaptation(values: Mapping[str, Any]) -> bool:
    """Whether values are those of an adaptation: they have a key that no recipe of a merge has."""
    return bool((AdaptRecipe.model_fields.keys() - Recipe.model_fields.keys()) & values.keys())


def build_adapt_recipe(values: dict[str, Any], *, base: Path | None = None) -> AdaptRecipe:
    """Builds the recipe of an adaptation from plain values.

    Args:
        values: Its values, nested as in a recipe file.
        base: The recipe file's folder; relative paths of local files are taken relative to it if they exist there.

    Returns:
        The recipe.

    Raises:
        InputError: Values are wrong or keys unknown; all faults are listed.
    """
    refuse_steps(values)
    training = values.get("training")
    if isinstance(training, dict):  # YAML reads 3e-4 as text
        alone = {
            name: [training[name]] for name in ("lr", "steps") if isinstance(training.get(name), int | float | str)
        }
        values = values | {"training": training | alone}
    if values.get("valid") is None and isinstance(values.get("training", {}), dict):
        values = values | {"training": WITHOUT_VALID | values.get("training", {})}
    recipe = checked(AdaptRecipe, with_mixing(values), RENAMED)
    require_different(values, recipe.sources)
    if len(recipe.sources) == 1:
        recipe = recipe.model_copy(update={"source": recipe.sources[0].source, "sources": ()})
    if recipe.sources and values.get("combine") is None:
        recipe = recipe.model_copy(update={"combine": SEVERAL})
    if recipe.budget is not None and recipe.tokens is not None:
        raise InputError("budget and tokens both bound the training: give one of them")
    if recipe.budgeted and recipe.valid is not None:
        _require_undecided(recipe)
    return recipe if base is None else found_near(recipe, base)


def _require_undecided(recipe: AdaptRecipe) -> None:
    """Raises InputError for settings other than the defaults that a budget decides."""
    given = [
        f"{section}.{name}"
        for section, names in DECIDED.items()
        for name in names
        if getattr(getattr(recipe, section), name) != type(getattr(recipe, section)).model_fields[name].default
    ]
    if given:
        raise InputError(f"a budget decides {', '.join(given)}: leave these settings out, or the budget")
