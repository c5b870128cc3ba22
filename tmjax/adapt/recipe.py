"""The recipe of an adaptation: everything `tmjax adapt` is told, as one frozen, checked object."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tmjax.adapt.step import TrainConfig
from tmjax.recipe import (
    Alpha,
    EvaluationOptions,
    ExportOptions,
    Positive,
    PositiveFloat,
    Role,
    Section,
    checked,
    found_near,
)

NotNegative = Annotated[float, Field(ge=0)]
#: Modes that need a source.
WITH_SOURCE = ("guided", "residual-frozen")


class TrainingOptions(Section):
    """How long and how fast; see `adapt.step.TrainConfig` for the optimiser.

    `lr` may hold several learning rates: every arm is trained with each, and validation text chooses. Validation takes
    place every `validate_every` steps, the best parameters are kept, and `patience` validations without a better one
    end the training. A checkpoint is written every `keep_every` steps and the newest `keep` are kept.
    """

    steps: Positive = 200
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
    unroll: Positive = 1
    validate_every: Positive = 20
    patience: Positive | None = None
    keep_every: Positive = 100
    keep: Positive = 2

    def config(self, lr: float, dtype: str, guide_weight: float = 0.0) -> TrainConfig:
        """The optimiser's part, for one learning rate."""
        names = ("steps", "tokens_per_step", "accumulate", "warmup", "final_lr", "weight_decay", "clip", "b1", "b2")
        told = {name: getattr(self, name) for name in (*names, "eps", "remat", "unroll")}
        return TrainConfig(lr=lr, dtype=dtype, guide_weight=guide_weight, **told)


class GuidanceOptions(Section):
    """How target features are tied to the source's: weight of the term, penalty of the initial ridge maps.

    `layers`: a target layer is tied to the source layer at its `depth`, or to the one with most weight in the layer
    `plan` of the run that is adapted.
    """

    weight: PositiveFloat = 5.0
    penalty: PositiveFloat = 0.1
    layers: Literal["depth", "plan"] = "depth"


class ResidualOptions(Section):
    """What is trained of W_base + alpha Mask Delta."""

    variant: Literal["frozen_delta", "frozen_base"] = "frozen_delta"


class LoraOptions(Section):
    """Low-rank updates of the projections `roles` (all unless said)."""

    rank: Positive = 8
    alpha: PositiveFloat = 16.0
    roles: Annotated[tuple[Role, ...], Field(min_length=1)] | None = None


class AdaptRecipe(Section):
    """A whole adaptation. `target` is a checkpoint, or a run of `tmjax merge` whose target and source are meant.

    `init` is where training begins: the target, or the merged model (default of residual-frozen). `alpha` fixes the
    coefficient of what is transported, which otherwise is the merge's. `merge` are settings of a merge's recipe, for
    modes that need one and a target that is not a run. `other_texts` are of other languages or domains: what the target
    and the result score on them is recorded.
    """

    source: str | None = None
    target: str
    texts: str
    valid: str | None = None
    test: str | None = None
    other_texts: tuple[str, ...] = ()
    out: str
    mode: Literal["sft", "residual-frozen", "guided", "lora"] = "guided"
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
    residual: ResidualOptions = ResidualOptions()
    lora: LoraOptions = LoraOptions()
    merge: Annotated[dict[str, Any], Field(default_factory=dict)]
    evaluation: EvaluationOptions = EvaluationOptions()
    export: ExportOptions = ExportOptions()

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
    if isinstance(training, dict) and isinstance(training.get("lr"), int | float):
        values = values | {"training": training | {"lr": [training["lr"]]}}
    recipe = checked(AdaptRecipe, values)
    return recipe if base is None else found_near(recipe, base)
