"""The recipe of a merge: all settings as one frozen, checked object. Files have the keys of the command line."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tmjax.plugins import plugin_file
from tmjax.recipes.base import (
    Alpha,
    EvaluationOptions,
    ExportOptions,
    Placed,
    Positive,
    PositiveFloat,
    Section,
)
from tmjax.recipes.sources import SOURCE, MixingKey, SourceEntry, by_key


class ActivationOptions(Section):
    """Recording of activations: the texts that are read, and the rows at which both models are paired."""

    keep: Annotated[
        bool,
        Field(
            description="Whether activations of all rows are stored. Otherwise the sums that alignment needs are taken "
            "while texts are read: 8 bytes per pair of units and of layers, however much text there is."
        ),
    ] = True
    block_rows: Annotated[Positive, Field(description="Rows that are summed at once, where none are stored.")] = 512
    pooling: Annotated[
        Literal["sequence", "span"],
        Field(description="Rows are whole texts (`sequence`) or whitespace-delimited pieces of text (`span`)."),
    ] = "span"
    max_texts: Annotated[
        Positive | None, Field(description="Largest number of calibration texts that are read; all unless given.")
    ] = None
    max_rows: Annotated[
        Positive | None,
        Field(
            description="Largest number of rows; of more, every text keeps its share, chosen by the seed. Unless "
            "given, the rows of stored activations are limited so that those of the largest site take at most 12 GB in "
            "float16."
        ),
    ] = None
    max_tokens: Annotated[Positive, Field(description="Tokens to which each text is cut.")] = 512
    batch_tokens: Annotated[Positive, Field(description="Tokens per batch of a forward pass.")] = 8192
    memory_mib: Annotated[
        Positive | None,
        Field(
            description="Memory of a batch's pooled activations, which may make the batch smaller. Unless given, a "
            "sixteenth of an accelerator's memory, 48 on a CPU."
        ),
    ] = None


class AlignmentOptions(Section):
    """Matching of units and layers."""

    cost: Annotated[
        Literal["correlation", "cosine"],
        Field(description="Cost of matching two units: one minus their correlation or their cosine over rows."),
    ] = "correlation"
    solver: Annotated[
        str, Field(description="Solver of neuron plans: any that finds couplings, by name or by its place.")
    ] = "scaling"
    solver_options: Annotated[
        dict[str, str | bool | int | float],
        Field(
            default_factory=dict,
            description="Further options of the solver; they win over `epsilon`, `max_iterations` and `threshold`.",
        ),
    ]
    epsilon: Annotated[
        PositiveFloat, Field(description="Entropic regularisation, in units of the cost, which lies in [0, 2].")
    ] = 0.02
    max_iterations: Annotated[Positive, Field(description="Largest number of iterations of a neuron plan.")] = 2000
    threshold: Annotated[PositiveFloat, Field(description="Marginal error at which a neuron plan is done.")] = 1e-5
    layer_epsilon: Annotated[PositiveFloat, Field(description="Entropic regularisation of layer plans.")] = 0.1
    layer_max_iterations: Annotated[Positive, Field(description="Largest number of iterations of a layer plan.")] = (
        10000
    )
    layer_threshold: Annotated[PositiveFloat, Field(description="Marginal error at which a layer plan is done.")] = 1e-6
    layer_cost_scale: Annotated[
        Literal["median", "none"],
        Field(
            description="`median` divides layer costs, less their minimum, by their median; `none` leaves them as they "
            "are."
        ),
    ] = "median"
    layer_top_k: Annotated[
        Positive | None, Field(description="Source layers that are kept per target layer; all unless given.")
    ] = None
    layer_pairs: Annotated[
        Literal["all", "coarse", "band"],
        Field(
            description="Pairs of layers that are solved: all; those with most weight in a layer plan guessed from few "
            "units (`coarse`); those at similar relative depths (`band`)."
        ),
    ] = "all"
    layer_mass: Annotated[
        float,
        Field(gt=0, le=1, description="Share of each target layer's weight that the pairs of `coarse` hold."),
    ] = 0.95
    layer_band: Annotated[
        float, Field(ge=0, le=1, description="Largest difference of relative depths of the pairs of `band`.")
    ] = 0.25
    coarse_units: Annotated[Positive, Field(description="Units per side that `coarse` guesses from.")] = 256
    plan_top_k: Annotated[
        Positive | None,
        Field(
            description="Entries of a plan that are kept: those among so many largest of their row or column; all "
            "unless given."
        ),
    ] = None
    gain: Annotated[bool, Field(description="Whether every unit's map is multiplied by its least-squares gain.")] = (
        False
    )
    structure: Annotated[
        Literal["none", "heads", "full"],
        Field(
            description="`none` matches the units of every site by themselves. `heads` matches key-value groups, query "
            "heads inside them, rotary planes by their frequencies and values inside matched heads. `full` also gives "
            "one plan to all that reads or writes the residual stream. With `heads` or `full` all projections share "
            "one layer plan."
        ),
    ] = "none"
    residual: Annotated[
        Literal["tied", "layer"],
        Field(
            description="Plan of the residual stream with `structure: full`: one for all layers (`tied`) or one for "
            "each pair of layers (`layer`)."
        ),
    ] = "tied"
    depth: Annotated[
        Literal["entropic", "monotone"],
        Field(
            description="`entropic` couples layers softly. `monotone` matches them one to one and in order, and target "
            "layers without a partner stay as they are; all projections then share one layer plan."
        ),
    ] = "entropic"
    feature_dtype: Annotated[
        Literal["float16", "float32"],
        Field(description="Dtype of activations that are stored beside potentials, from which plans are rebuilt."),
    ] = "float16"
    memory_mib: Annotated[
        Positive | None,
        Field(
            description="Memory of the solver beside the activations of a site. Unless given, a quarter of an "
            "accelerator's memory, 512 on a CPU."
        ),
    ] = None

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

    source: Annotated[str, Field(description="Source checkpoint: directory or hub id; the first of several.")]
    sources: Annotated[
        tuple[SourceEntry, ...],
        Field(
            description="Several sources in place of `source`: names, or entries `{source: NAME, weight: W}`. The "
            "operator `predictions` mixes what they predict, all others take the first alone."
        ),
    ] = ()
    mixing: MixingKey = "prediction"
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
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="Dtype that forward passes compute in; auto: bfloat16 on accelerators, float32 on a CPU."),
    ] = "auto"
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

    def inputs(self) -> dict[str, str]:
        """Returns the names of all inputs, by their keys: files of operators and of a solver are among them."""
        files = {
            f"operators.{number}": plugin_file(name) for number, entry in enumerate(self.operators) for name in entry
        }
        files["alignment.solver"] = plugin_file(self.alignment.solver)
        named = {name: entry.source for name, entry in self.further_sources.items()}
        return super().inputs() | named | {key: file for key, file in files.items() if file is not None}

    @property
    def further_sources(self) -> dict[str, SourceEntry]:
        """The sources after the first, by their names in stages, inputs and arms."""
        return {name: entry for name, entry in by_key(self.sources).items() if name != SOURCE}

    def located_alignment(self) -> AlignmentOptions:
        """Returns the options of the alignment with the present place of a solver's file."""
        file = plugin_file(self.alignment.solver)
        if file is None:
            return self.alignment
        located = f"{self.place(file)}{self.alignment.solver.removeprefix(file)}"
        return self.alignment.model_copy(update={"solver": located})

    def bases(self) -> dict[str, str]:
        """Returns the checkpoints that operators name as `base`, by their keys."""
        return {
            f"operators.{number}.{name}.base": str(options["base"])
            for number, entry in enumerate(self.operators)
            for name, options in entry.items()
            if options.get("base") is not None
        }
