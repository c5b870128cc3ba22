"""The recipe: everything a run is told, as one frozen, checked object. Files hold the same keys as the command line."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tmjax.errors import InputError, summarise
from tmjax.recipes.base import (
    Alpha,
    EvaluationOptions,
    ExportOptions,
    Placed,
    Positive,
    PositiveFloat,
    Section,
)


class ActivationOptions(Section):
    """What is recorded: rows are texts (`sequence`) or whitespace-delimited pieces of text (`span`).

    `keep`: activations are stored, all rows of them; otherwise only what alignment needs is summed up, in blocks of
    `block_rows` rows, which takes no more room however much text is read (8 bytes per pair of units and of layers).

    `max_rows` is the largest number of rows; of more, every text keeps its share, chosen by the seed. Unless given, the
    rows of kept activations are limited so that those of the largest site take at most 12 GB in float16.
    """

    keep: bool = True
    block_rows: Positive = 512
    pooling: Literal["sequence", "span"] = "span"
    max_texts: Positive | None = None
    max_rows: Positive | None = None
    max_tokens: Positive = 512
    batch_tokens: Positive = 8192
    memory_mib: Positive | None = None


class AlignmentOptions(Section):
    """How units and layers are matched. Both epsilons are in units of the cost, which lies in [0, 2].

    `solver` is any that `tmjax.ot.SOLVERS` knows and that finds couplings; `epsilon`, `max_iterations` and `threshold`
    go to those that have them, and `solver_options` holds the solver's other options (or overrides these three).

    `layer_pairs` says which pairs of layers are solved: `all`; `coarse`, those that hold the share `layer_mass` of each
    target layer's weight in a layer plan guessed from `coarse_units` units a side; `band`, those whose relative depths
    differ by at most `layer_band`. `layer_top_k` keeps only so many source layers per target layer, `plan_top_k` only
    the entries of a plan among the so many largest of their row or column. `gain` multiplies every unit's map by its
    least-squares gain. Where the activations are kept with the potentials (large models), it is as `feature_dtype`.
    `memory_mib` is what the solver may use beside the activations of a site: unless given, a quarter of an
    accelerator's memory, 512 on a CPU.

    `structure`: `none` matches the units of every site by themselves; `heads` matches key-value groups, query heads
    inside them, rotary planes by their frequencies and values inside matched heads; `full` also gives all that reads
    or writes the residual stream one plan, for all layers (`residual: tied`) or for each pair of them (`layer`).
    `depth`: `entropic` couples layers softly; `monotone` one to one and in order, leaving target layers without a
    partner as they are. With either of the two all projections share one layer plan.
    """

    cost: Literal["correlation", "cosine"] = "correlation"
    solver: str = "scaling"
    solver_options: Annotated[dict[str, str | bool | int | float], Field(default_factory=dict)]
    epsilon: PositiveFloat = 0.02
    max_iterations: Positive = 2000
    threshold: PositiveFloat = 1e-5
    layer_epsilon: PositiveFloat = 0.1
    layer_max_iterations: Positive = 10000
    layer_threshold: PositiveFloat = 1e-6
    layer_cost_scale: Literal["median", "none"] = "median"
    layer_top_k: Positive | None = None
    layer_pairs: Literal["all", "coarse", "band"] = "all"
    layer_mass: Annotated[float, Field(gt=0, le=1)] = 0.95
    layer_band: Annotated[float, Field(ge=0, le=1)] = 0.25
    coarse_units: Positive = 256
    plan_top_k: Positive | None = None
    gain: bool = False
    structure: Literal["none", "heads", "full"] = "none"
    residual: Literal["tied", "layer"] = "tied"
    depth: Literal["entropic", "monotone"] = "entropic"
    feature_dtype: Literal["float16", "float32"] = "float16"
    memory_mib: Positive | None = None

    @property
    def centred(self) -> bool:
        """Whether means are subtracted: for correlations, not for cosines."""
        return self.cost == "correlation"

    @property
    def whole_layers(self) -> bool:
        """Whether all projections share one layer plan."""
        return self.structure != "none" or self.depth == "monotone"


class LearningOptions(Section):
    """Learning of coefficients: Adam on the calibration texts; the best on the validation texts is kept."""

    granularity: Annotated[
        Literal["tensor", "head", "unit"],
        Field(description="One alpha and beta per tensor and layer, per head (of q, k, v and o) or per unit."),
    ] = "tensor"
    steps: Annotated[Positive, Field(description="Steps of Adam.")] = 200
    lr: Annotated[PositiveFloat, Field(description="Learning rate.")] = 0.01
    batch_tokens: Annotated[Positive, Field(description="Tokens per batch.")] = 4096
    check_every: Annotated[Positive, Field(description="Steps between scores of the validation texts.")] = 20
    patience: Annotated[Positive, Field(description="Scores without a better one that end the learning.")] = 3


class CoefficientOptions(Section):
    """Choice of alpha and beta, the coefficients of everything that is transported: W = W_T + alpha W^ + beta W_T."""

    fit: Annotated[
        Literal["grid", "learned"],
        Field(description="`grid` tries every pair of alphas and betas, `learned` learns them by gradient."),
    ] = "grid"
    beta: Annotated[
        float | Literal["tied", "fit"],
        Field(description="A number, `tied` (minus alpha, so that alpha blends) or `fit` (one of `betas`)."),
    ] = "fit"
    alphas: Annotated[
        tuple[Alpha, ...], Field(min_length=1, description="Alphas tried on the validation texts, per group.")
    ] = (0.0, 0.02, 0.04, 0.08)
    betas: Annotated[
        tuple[float, ...], Field(min_length=1, description="Betas tried on the validation texts, per group.")
    ] = (-0.1, -0.05, 0.0, 0.05)
    groups: Annotated[
        Literal["all", "kind", "role"],
        Field(description="Projections that share coefficients: all, those of one kind (attention, MLP), or none."),
    ] = "kind"
    learning: Annotated[LearningOptions, Field(description="Settings of `fit: learned`.")] = LearningOptions()


class Recipe(Placed):
    """A whole merge. Model names are directories or hub ids; texts are files or `hf:NAME[:split[:field]]`."""

    source: Annotated[str, Field(description="Source checkpoint: directory or hub id.")]
    target: Annotated[str, Field(description="Target checkpoint, whose architecture is kept.")]
    texts: Annotated[str, Field(description="Calibration texts.")]
    valid: Annotated[str | None, Field(description="Texts on which coefficients and steps are chosen.")] = None
    test: Annotated[str | None, Field(description="Texts on which the result is measured, once.")] = None
    other_texts: Annotated[
        tuple[str, ...],
        Field(description="Texts of other languages or domains, on which target and result are scored too."),
    ] = ()
    same_size_source: Annotated[
        str | None, Field(description="A model no larger than the target, merged as well where controls are run.")
    ] = None
    out: Annotated[str, Field(description="Run directory.")]
    preset: Annotated[
        Literal["predictions", "quick", "barycentric", "paper"],
        Field(description="Operator list and settings that the recipe's own keys replace; `predictions` by default."),
    ] = "barycentric"
    alpha: Annotated[
        Alpha | None,
        Field(description="Fixes alpha; operators that choose on validation texts are then left out."),
    ] = None
    controls: Annotated[bool, Field(description="Whether every control arm is run too.")] = False
    self_source: Annotated[
        bool, Field(description="Whether the target is merged into itself, as a row beside the controls.")
    ] = True
    allow_negligible: Annotated[
        bool, Field(description="Whether a merge in which nothing came from the source is a warning.")
    ] = False
    seed: Annotated[
        int,
        Field(
            ge=0, description="Seed of everything random; one other than 0 also draws `activations.max_texts` texts."
        ),
    ] = 0
    mesh: Annotated[str | None, Field(description="Device mesh; chosen over all devices unless given.")] = None
    dtype: Annotated[Literal["float32", "bfloat16"], Field(description="Dtype that forward passes compute in.")] = (
        "float32"
    )
    screen_texts: Annotated[
        Positive | None,
        Field(
            description="Candidates are first compared on so many validation texts, evenly spaced; the best is taken "
            "if it is better on all. Unless given, all are compared on all."
        ),
    ] = None
    activations: Annotated[ActivationOptions, Field(description="Recording of activations.")] = ActivationOptions()
    alignment: Annotated[AlignmentOptions, Field(description="Matching of units and layers.")] = AlignmentOptions()
    operators: Annotated[
        tuple[dict[str, dict[str, Any]], ...],
        Field(min_length=1, description="Operators in order, each with its options; replaces the preset's list."),
    ] = ({"transport": {}},)
    coefficients: Annotated[
        CoefficientOptions, Field(description="Choice of alpha and beta of what is transported.")
    ] = CoefficientOptions()
    evaluation: Annotated[EvaluationOptions, Field(description="Scoring.")] = EvaluationOptions()
    export: Annotated[ExportOptions, Field(description="Writing of the merged checkpoint.")] = ExportOptions()
    places: Annotated[
        dict[str, str],
        Field(
            default_factory=dict, description="Written with a run: absolute places of its local inputs, by their names."
        ),
    ]

    def bases(self) -> dict[str, str]:
        """Returns the checkpoints that operators name as `base`, by their keys."""
        return {
            f"operators.{number}.{name}.base": str(options["base"])
            for number, entry in enumerate(self.operators)
            for name, options in entry.items()
            if options.get("base") is not None
        }


#: Keys of older recipes, and where their settings are now.
_MOVED = {
    **dict.fromkeys(
        ("map", "roles", "mask_top_k", "norm_match", "bias", "base", "trust"), "operators: [{transport: {KEY: ...}}]"
    ),
    **dict.fromkeys(("fit", "beta", "alphas", "betas", "groups", "learning"), "coefficients.KEY"),
    **dict.fromkeys(("embeddings", "norms"), "operators: [{transport: {}}, {residual_stream: {KEY: ...}}]"),
    "transport": "operators: [{regression: {}}]",
    "ridge": "operators: [{regression: {ridge: ...}}]",
    "screen_texts": "screen_texts",
    "lexical": "operators: [..., {embeddings: {...}}]",
    "solve": "operators: [..., {predictions: {...}}]",
}


def refuse_old_keys(values: dict[str, Any]) -> None:
    """Raises InputError for the section `fusion` of older recipes, in one line that says the new keys."""
    if "fusion" not in values:
        return
    section = values["fusion"]
    keys = list(section) if isinstance(section, dict) and section else list(_MOVED)
    lines = [f"fusion.{key} is now {_MOVED.get(key, 'operators').replace('KEY', key)}" for key in keys]
    raise InputError(f"recipe: the section fusion is now a list of operators: {summarise(lines)}")


def merged_values(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Returns nested values over defaults: mappings are merged, everything else is replaced."""
    result = dict(defaults)
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged_values(result[key], value) if nested else value
    return result
