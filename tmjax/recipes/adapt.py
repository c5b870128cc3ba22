"""The recipe of an adaptation as one frozen, checked object. Files hold the same keys as the command line."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tmjax.recipes.base import (
    FOREIGN,
    Alpha,
    EvaluationOptions,
    ExportOptions,
    Placed,
    Positive,
    PositiveFloat,
    Role,
    Section,
    checked,
    found_near,
)

NotNegative = Annotated[float, Field(ge=0)]
#: Modes that need a source, beside those with terms.
WITH_SOURCE = ("residual-frozen",)
Term = Literal["guidance", "distillation", "generated"]
#: Terms of the loss, and further texts, that each mode adds to next-token training on the given texts.
TERMS: dict[str, tuple[Term, ...]] = {
    "guided": ("guidance",),
    "distilled": ("distillation",),
    "source-written": ("generated",),
    "combined": ("guidance", "distillation", "generated"),
}
#: Former keys and their present names.
RENAMED = {"written": "generation", "distillation.least": "distillation.min_probability"}


class TrainingOptions(Section):
    """Optimiser, schedule, validation and checkpoints of a training; see `train.step.TrainConfig` for the optimiser.

    `lr` and `steps` may hold several values: every arm is trained with each pair, and validation text chooses.
    Validation takes place every `validate_every` steps, the best parameters are kept, and `patience` validations
    without a better one end the training. The weights of guidance and distillation fall along a cosine to `anneal`
    times their initial values. A checkpoint is written every `keep_every` steps and the newest `keep` are kept.
    """

    steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (200,)
    lr: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (3e-4,)
    warmup: Annotated[int, Field(ge=0)] = 20
    final_lr: NotNegative = 0.1
    weight_decay: NotNegative = 0.1
    clip: PositiveFloat = 1.0
    b1: NotNegative = 0.9
    b2: NotNegative = 0.95
    eps: PositiveFloat = 1e-8
    tokens_per_step: Positive = 2048
    accumulate: Positive = 1
    row_lengths: Positive = 4
    remat: bool = False
    unroll: Positive = 4
    anneal: Annotated[float, Field(ge=0, le=1)] = 1.0
    validate_every: Positive = 20
    patience: Positive | None = None
    keep_every: Positive = 100
    keep: Positive = 2

    @property
    def schedules(self) -> list[tuple[int, float]]:
        """Every (steps, learning rate) that an arm is trained with."""
        return [(steps, lr) for steps in self.steps for lr in self.lr]


class GuidanceOptions(Section):
    """How target features are tied to the source's: weight of the term, penalty of the initial ridge maps.

    `metric`: errors count alike in every standardised unit (`units`), or by their effect on the source's predictions
    (`fisher`: the Fisher information of its read-out). `layers`: a target layer is tied to the source layer at its
    `depth`, or to the one with most weight in the layer `plan` of the run that is adapted.
    """

    weight: PositiveFloat = 5.0
    penalty: PositiveFloat = 0.1
    layers: Literal["depth", "plan"] = "depth"
    metric: Literal["units", "fisher"] = "units"


class DistillationOptions(Section):
    """How the target is trained toward the source's probabilities of its own tokens.

    `weight` is that of the divergence in the loss; the other keys are those of `teacher.probabilities.Search`.
    """

    weight: PositiveFloat = 1.0
    steps: Positive = 3
    candidates: Positive = 128
    min_probability: PositiveFloat = 0.02
    branches: Positive = 4
    keep: Positive = 32


class GenerationOptions(Section):
    """Texts that the source generates after the first 1 to `words` words of training texts.

    Before each prompt stand `examples` of the given texts, a line each, which keep a general model with their subject
    and form (null: 3 for a source that begins or ends the given texts by another convention, else none). Texts whose
    bits per byte under the target exceed `foreign` times those of the given ones are left out (null: none are). The
    given texts are read `repeat` times as often as generated ones. The other keys are those of
    `teacher.generation.Generation`.
    """

    texts: Positive = 3000
    words: Positive = 3
    tokens: Positive = 192
    temperature: PositiveFloat = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    examples: Annotated[int, Field(ge=0)] | None = None
    foreign: PositiveFloat | None = FOREIGN
    repeat: Positive = 1


class ResidualOptions(Section):
    """Which part of W_base + alpha Mask Delta is trained: the base (`frozen_delta`) or the delta (`frozen_base`)."""

    variant: Literal["frozen_delta", "frozen_base"] = "frozen_delta"


class LoraOptions(Section):
    """Low-rank updates of the projections `roles` (all unless said)."""

    rank: Positive = 8
    alpha: PositiveFloat = 16.0
    roles: Annotated[tuple[Role, ...], Field(min_length=1)] | None = None


class AdaptRecipe(Placed):
    """A whole adaptation. `target` is a checkpoint, or a run of `tmjax merge` whose target and source are meant.

    `init` is where training begins: the target, or the merged model (default of residual-frozen). `alpha` fixes the
    coefficient of transported weights, which otherwise is the merge's. `combine` lists the terms of mode combined.
    `merge` holds settings of a merge's recipe (preset `barycentric` by default), for modes that need one and a target
    that is not a run. `other_texts` are of other languages or domains: the scores of the target and of the result on
    them are recorded. `places` is written with a run: the absolute paths of its local inputs, by their names.
    """

    source: str | None = None
    target: str
    texts: str
    valid: str | None = None
    test: str | None = None
    other_texts: tuple[str, ...] = ()
    out: str
    mode: Literal["sft", "residual-frozen", "guided", "distilled", "source-written", "combined", "lora"] = "guided"
    combine: Annotated[tuple[Term, ...], Field(min_length=1)] = TERMS["combined"]
    init: Literal["target", "merged"] | None = None
    alpha: Alpha | None = None
    controls: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    mesh: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_texts: Positive | None = None
    max_tokens: Annotated[int, Field(ge=2)] = 512
    training: TrainingOptions = TrainingOptions()
    guidance: GuidanceOptions = GuidanceOptions()
    distillation: DistillationOptions = DistillationOptions()
    generation: GenerationOptions = GenerationOptions()
    residual: ResidualOptions = ResidualOptions()
    lora: LoraOptions = LoraOptions()
    merge: Annotated[dict[str, Any], Field(default_factory=dict)]
    evaluation: EvaluationOptions = EvaluationOptions()
    export: ExportOptions = ExportOptions()
    places: Annotated[dict[str, str], Field(default_factory=dict)]

    @property
    def terms(self) -> frozenset[str]:
        """Terms that are added to next-token training on the given texts."""
        return frozenset(self.combine if self.mode == "combined" else TERMS.get(self.mode, ()))

    @property
    def start(self) -> str:
        """The model at which training begins."""
        return self.init or ("merged" if self.mode == "residual-frozen" else "target")

    @property
    def merges(self) -> bool:
        """Whether a merge is needed."""
        return self.mode == "residual-frozen" or self.start == "merged"


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
    training = values.get("training")
    if isinstance(training, dict):  # YAML reads 3e-4 as text
        alone = {
            name: [training[name]] for name in ("lr", "steps") if isinstance(training.get(name), int | float | str)
        }
        values = values | {"training": training | alone}
    recipe = checked(AdaptRecipe, values, RENAMED)
    return recipe if base is None else found_near(recipe, base)
