"""The recipe of an adaptation: everything `tmjax adapt` is told, as one frozen, checked object."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tmjax.recipes.base import (
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
from tmjax.teacher.generation import Writing
from tmjax.teacher.probabilities import Search
from tmjax.train.step import TrainConfig

NotNegative = Annotated[float, Field(ge=0)]
#: Modes that need a source, beside those with terms.
WITH_SOURCE = ("residual-frozen",)
Term = Literal["guidance", "distillation", "written"]
#: What each mode learns from beside the given texts.
TERMS: dict[str, tuple[Term, ...]] = {
    "guided": ("guidance",),
    "distilled": ("distillation",),
    "source-written": ("written",),
    "combined": ("guidance", "distillation", "written"),
}


class TrainingOptions(Section):
    """How long and how fast; see `adapt.step.TrainConfig` for the optimiser.

    `lr` and `steps` may hold several values: every arm is trained with each pair, and validation text chooses.
    Validation takes place every `validate_every` steps, the best parameters are kept, and `patience` validations
    without a better one end the training. The weights of guidance and distillation fall along a cosine to `anneal`
    times what they begin with. A checkpoint is written every `keep_every` steps and the newest `keep` are kept.
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

    def config(
        self, steps: int, lr: float, dtype: str, *, guide_weight: float = 0.0, teach_weight: float = 0.0
    ) -> TrainConfig:
        """The optimiser's part, for one schedule and weights of the terms."""
        names = ("tokens_per_step", "accumulate", "warmup", "final_lr", "weight_decay", "clip", "b1", "b2")
        told = {name: getattr(self, name) for name in (*names, "eps", "remat", "unroll", "anneal")}
        return TrainConfig(steps, lr=lr, dtype=dtype, guide_weight=guide_weight, teach_weight=teach_weight, **told)


class GuidanceOptions(Section):
    """How target features are tied to the source's: weight of the term, penalty of the initial ridge maps.

    `metric`: errors count alike in every standardised unit (`units`), or by what they do to the source's predictions
    (`fisher`: the Fisher information of its read-out). `layers`: a target layer is tied to the source layer at its
    `depth`, or to the one with most weight in the layer `plan` of the run that is adapted.
    """

    weight: PositiveFloat = 5.0
    penalty: PositiveFloat = 0.1
    layers: Literal["depth", "plan"] = "depth"
    metric: Literal["units", "fisher"] = "units"


class DistillationOptions(Section):
    """How the target is held to the source's probabilities of its own tokens; see `adapt.teacher.Search`."""

    weight: PositiveFloat = 1.0
    steps: Positive = 3
    candidates: Positive = 128
    least: PositiveFloat = 0.02
    branches: Positive = 4
    keep: Positive = 32

    def search(self) -> Search:
        """How far continuations are followed."""
        return Search(self.steps, self.candidates, self.least, self.branches, self.keep)


class WrittenOptions(Section):
    """Texts that the source writes after the first 1 to `words` words of training texts; see `adapt.written.Writing`.

    Texts that the target finds more foreign than `foreign` times the given ones are left out (null: none are). The
    given texts are read `repeat` times as often as written ones.
    """

    texts: Positive = 3000
    words: Positive = 3
    tokens: Positive = 192
    temperature: PositiveFloat = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    foreign: PositiveFloat | None = 1.5
    repeat: Positive = 1

    def writing(self) -> Writing:
        """How texts are drawn."""
        return Writing(self.texts, self.words, self.tokens, self.temperature, self.top_p)


class ResidualOptions(Section):
    """What is trained of W_base + alpha Mask Delta."""

    variant: Literal["frozen_delta", "frozen_base"] = "frozen_delta"


class LoraOptions(Section):
    """Low-rank updates of the projections `roles` (all unless said)."""

    rank: Positive = 8
    alpha: PositiveFloat = 16.0
    roles: Annotated[tuple[Role, ...], Field(min_length=1)] | None = None


class AdaptRecipe(Placed):
    """A whole adaptation. `target` is a checkpoint, or a run of `tmjax merge` whose target and source are meant.

    `init` is where training begins: the target, or the merged model (default of residual-frozen). `alpha` fixes the
    coefficient of what is transported, which otherwise is the merge's. `combine` are the terms of mode combined.
    `merge` are settings of a merge's recipe (preset `barycentric` unless said), for modes that need one and a target
    that is not a run. `other_texts` are of other languages or domains: what the target and the result score on them is
    recorded. `places` is written with a run: the absolute places of its local inputs, by their names.
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
    written: WrittenOptions = WrittenOptions()
    residual: ResidualOptions = ResidualOptions()
    lora: LoraOptions = LoraOptions()
    merge: Annotated[dict[str, Any], Field(default_factory=dict)]
    evaluation: EvaluationOptions = EvaluationOptions()
    export: ExportOptions = ExportOptions()
    places: Annotated[dict[str, str], Field(default_factory=dict)]

    @property
    def terms(self) -> frozenset[str]:
        """What is learnt from beside the given texts."""
        return frozenset(self.combine if self.mode == "combined" else TERMS.get(self.mode, ()))

    @property
    def start(self) -> str:
        """Where training begins."""
        return self.init or ("merged" if self.mode == "residual-frozen" else "target")

    @property
    def merges(self) -> bool:
        """Whether a merge is needed."""
        return self.mode == "residual-frozen" or self.start == "merged"


def build_adapt_recipe(values: dict[str, Any], *, base: Path | None = None) -> AdaptRecipe:
    """Checks `values` (nested, as in a recipe file); raises InputError listing all faults.

    Relative paths of local files are taken relative to `base`, the recipe file's folder, if they exist there.
    """
    training = values.get("training")
    if isinstance(training, dict):  # YAML reads 3e-4 as text
        alone = {
            name: [training[name]] for name in ("lr", "steps") if isinstance(training.get(name), int | float | str)
        }
        values = values | {"training": training | alone}
    recipe = checked(AdaptRecipe, values)
    return recipe if base is None else found_near(recipe, base)
