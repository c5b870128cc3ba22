"""The recipe: everything a run is told, as one frozen, checked object. Files hold the same keys as the command line."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tmjax.errors import InputError, summarise

Alpha = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
ALL_ROLES: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION_ROLES: tuple[Role, ...] = ("q", "k", "v", "o")


class Section(BaseModel):
    """A frozen part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Placed(Section):
    """A recipe that names inputs, of whose local ones `places` says where they lay when it was stored."""

    if TYPE_CHECKING:
        out: str
        places: dict[str, str]

    def inputs(self) -> dict[str, str]:
        """Names of all inputs, by their keys."""
        found: dict[str, str | None] = {key: getattr(self, key, None) for key in _PATHS}
        found |= {f"other_texts.{number}": name for number, name in enumerate(getattr(self, "other_texts", ()))}
        found["fusion.base"] = getattr(getattr(self, "fusion", None), "base", None)
        return {key: name for key, name in found.items() if name is not None}

    def place(self, name: str) -> str:
        """Where the input of a name is: where it was when the recipe was stored, else where the name says.

        Relative names are meant from here, then from a folder above the run, which may have been moved with its inputs.
        """
        here, stored = Path(name).expanduser(), self.places.get(name)
        if stored is None or (here.exists() and (not Path(stored).exists() or here.samefile(stored))):
            return name
        if Path(stored).exists() or here.is_absolute():
            return stored
        above = (folder / name for folder in Path(self.out).absolute().parents)
        return next((str(place) for place in above if place.exists()), name)

    def moved(self) -> list[str]:
        """A line for every input that is not where it was; raises InputError for one that is nowhere."""
        lines = []
        for key, name in self.inputs().items():
            stored, place = self.places.get(name), self.place(name)
            if stored is None or Path(stored).exists():
                continue
            if not Path(place).expanduser().exists():
                raise InputError(f"{key} {name} is neither here nor where it was ({stored}); put it back to either")
            lines.append(f"{key} {name} is no longer at {stored}: {Path(place).absolute()} is taken")
        return lines

    def placed(self: "P") -> "P":
        """The recipe with the places that its local inputs have now."""
        now = {name: Path(self.place(name)).expanduser() for name in self.inputs().values()}
        return self.model_copy(update={"places": {n: os.path.abspath(p) for n, p in now.items() if p.exists()}})


_PATHS = ("source", "target", "texts", "valid", "test", "same_size_source")
R = TypeVar("R", bound=Section)
P = TypeVar("P", bound=Placed)


class ActivationOptions(Section):
    """What is recorded: rows are texts (`sequence`) or whitespace-delimited pieces of text (`span`).

    `keep`: activations are stored, all rows of them; otherwise only what alignment needs is summed up, in blocks of
    `block_rows` rows, which takes no more room however much text is read (8 bytes per pair of units and of layers).
    """

    keep: bool = True
    block_rows: Positive = 512
    pooling: Literal["sequence", "span"] = "span"
    max_texts: Positive | None = None
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
    solver_options: dict[str, str | bool | int | float] = {}
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
    """How coefficients are learned: Adam on the calibration texts, the best on the validation texts is kept.

    `granularity`: one alpha and beta per tensor and layer, per head (of q, k, v and o) or per unit. Every `check_every`
    steps the validation texts are scored; after `patience` scores without a better one it ends.
    """

    granularity: Literal["tensor", "head", "unit"] = "tensor"
    steps: Positive = 200
    lr: PositiveFloat = 0.01
    batch_tokens: Positive = 4096
    check_every: Positive = 20
    patience: Positive = 3


class SolveOptions(Section):
    """Ridge regressions toward the source's predictions, after the weights are fused; see `fuse.solve`.

    `reach`: the `readout` alone is solved for, or also what writes the residual stream (`direct`: the output
    projections of attention and MLP of every layer, each as if nothing came after it). At most `rounds` times all are
    solved; what the source's word weighs beside the true tokens, and how far to go, validation text chooses, and
    `patience` rounds without a better trial end it. `ridge` is in units of the mean square of the inputs;
    `prior_tokens` are tokens that each token of the vocabulary counts as seen before any text.

    Beside the calibration texts the source is asked about `written` texts that it writes itself, of at most `tokens`
    tokens after the first words of calibration texts (0: none).
    """

    reach: Literal["readout", "direct"] = "direct"
    rounds: Positive = 20
    ridge: PositiveFloat = 0.1
    prior_tokens: PositiveFloat = 30.0
    patience: Positive = 2
    written: Annotated[int, Field(ge=0)] = 3000
    tokens: Positive = 96


class LexicalOptions(Section):
    """Embeddings of tokens mapped from the source's and blended into the target's, before the solve; `fuse.lexical`.

    `alphas` and `kappas` are what is tried on the validation texts beside no change: a token that occurs c times in the
    calibration texts moves by alpha kappa / (kappa + c) of the way. The map is fitted, with `ridge` in units of the
    mean variance of the source's embeddings, on tokens that occur at least `frequent` times.
    """

    alphas: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.1, 0.3, 0.6, 1.0)
    kappas: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (3.0, 30.0, 300.0, 3000.0)
    frequent: Positive = 3
    ridge: PositiveFloat = 0.1


class FusionOptions(Section):
    """How the source's weights enter the target's.

    `roles` are the projections to be transported (all that both models have, unless said), `map` is how plans become
    maps, `norm_match` rescales each transported tensor to its target's norm, `beta` is the change of the target's own
    weights (`tied`: minus alpha, so that alpha blends), and `alphas`, `betas` are what is tried on the validation texts
    when alpha is not given, per group of projections. `embeddings: shared` also transports the embeddings (and output
    rows) of tokens that both models have, `norms: transported` the norms of the residual stream; both go through the
    stream's plan, which `alignment.structure: full` has.

    `fit: grid` tries the grid; `learned` learns alpha and beta by gradient (`learning`). `trust` caps the change of
    every tensor at this part of its norm. `base` names a checkpoint of the target's architecture: task vectors
    W^ - W_base are fused. `transport: regression` fuses, instead of transported weights, those that by least squares
    turn the target's inputs into the source's mapped outputs (`ridge` holds them at the target's own).

    With `screen_texts` candidates are compared on so many of the validation texts, evenly spaced, and the best of them
    is taken if it is better on all; unless given, all are compared on all.

    `lexical`: then the source's embeddings, mapped through the texts of tokens, are blended into the target's
    (`LexicalOptions`); `solve`: at last the target is solved for toward the source's predictions of its own tokens on
    the calibration texts (`SolveOptions`). A fixed alpha leaves both out: nothing is then chosen on validation texts.
    """

    map: Literal["paper", "barycentric"] = "barycentric"
    roles: Annotated[tuple[Role, ...], Field(min_length=1)] | None = None
    mask_top_k: Positive | None = None
    norm_match: bool = True
    bias: Literal["transported", "keep_mean", "none"] = "transported"
    beta: float | Literal["tied", "fit"] = "fit"
    alphas: Annotated[tuple[Alpha, ...], Field(min_length=1)] = (0.0, 0.02, 0.04, 0.08)
    betas: Annotated[tuple[float, ...], Field(min_length=1)] = (-0.1, -0.05, 0.0, 0.05)
    groups: Literal["all", "kind", "role"] = "kind"
    embeddings: Literal["keep", "shared"] = "keep"
    norms: Literal["keep", "transported"] = "keep"
    fit: Literal["grid", "learned"] = "grid"
    learning: LearningOptions = LearningOptions()
    trust: PositiveFloat | None = None
    base: str | None = None
    transport: Literal["weights", "regression"] = "weights"
    ridge: PositiveFloat = 0.1
    screen_texts: Positive | None = None
    lexical: LexicalOptions | None = None
    solve: SolveOptions | None = None


class EvaluationOptions(Section):
    """How bits per byte and their intervals are computed."""

    draws: Positive = 10000
    batch_tokens: Positive = 4096
    max_tokens: Positive | None = None


class ExportOptions(Section):
    """How the merged checkpoint is written."""

    max_shard_size: str = "5GB"


class Recipe(Placed):
    """A whole run. Model names are directories or hub ids; texts are files or `hf:NAME[:split[:field]]`.

    `other_texts` are of other languages or domains: what the target and the result score on them is recorded.
    `places` is written with a run: the absolute places of its local inputs, by their names. Where controls are run,
    `same_size_source` and, with `self_source`, the target itself are merged into the target too, as rows for
    comparison. With a `seed` other than 0, `activations.max_texts` takes a random part of the calibration texts instead
    of the first.
    """

    source: str
    target: str
    texts: str
    valid: str | None = None
    test: str | None = None
    other_texts: tuple[str, ...] = ()
    same_size_source: str | None = None
    out: str
    preset: Literal["predictions", "quick", "barycentric", "paper"] = "barycentric"
    alpha: Alpha | None = None
    controls: bool = False
    self_source: bool = True
    allow_negligible: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    mesh: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    activations: ActivationOptions = ActivationOptions()
    alignment: AlignmentOptions = AlignmentOptions()
    fusion: FusionOptions = FusionOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    export: ExportOptions = ExportOptions()
    places: dict[str, str] = {}

    @property
    def solves(self) -> bool:
        """Whether predictions are solved for: not at a fixed alpha, where validation text chooses nothing."""
        return self.fusion.solve is not None and self.alpha is None

    @property
    def blends(self) -> bool:
        """Whether embeddings are blended: not at a fixed alpha either."""
        return self.fusion.lexical is not None and self.alpha is None


#: What `build_recipe` takes unless told otherwise. A bare `Recipe` has no preset's settings: it is `barycentric`.
DEFAULT_PRESET = "predictions"
#: Defaults that a preset sets; what the recipe says itself wins. `paper` is METHOD of arXiv:2602.05495 as printed,
#: `barycentric` transports weights alone, `predictions` goes on to blend embeddings and to solve for the source's
#: predictions, `quick` does so with fewer written texts and rounds.
PRESETS: dict[str, dict[str, Any]] = {
    "predictions": {"fusion": {"lexical": {}, "solve": {}}},
    "quick": {"fusion": {"lexical": {}, "solve": {"written": 600, "rounds": 10}}},
    "barycentric": {},
    "paper": {
        "alpha": 0.1,
        "activations": {"pooling": "sequence"},
        "alignment": {
            "cost": "correlation",
            "epsilon": 0.1,
            "max_iterations": 200,
            "threshold": 1e-6,
            "layer_epsilon": 0.1,
            "layer_max_iterations": 1000,
            "layer_threshold": 1e-6,  # the paper asks for 1e-9, which float32 marginals cannot show
            "layer_cost_scale": "median",
            "feature_dtype": "float32",
        },
        "fusion": {
            "map": "paper",
            "roles": list(ATTENTION_ROLES),
            "mask_top_k": 128,
            "norm_match": False,
            "bias": "transported",
            "beta": "tied",
        },
    },
}


def build_recipe(values: dict[str, Any], *, base: Path | None = None) -> Recipe:
    """Checks `values` (nested, as in a recipe file) over their preset's defaults; raises InputError listing all faults.

    Relative paths of local files are taken relative to `base`, the recipe file's folder, if they exist there.
    """
    preset = values.get("preset", DEFAULT_PRESET)
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r} is not known; known are {', '.join(PRESETS)}")
    recipe = checked(Recipe, _over(PRESETS[preset], values | {"preset": preset}))
    return recipe if base is None else found_near(recipe, base)


def checked(kind: type[R], values: dict[str, Any]) -> R:
    """A recipe of this kind from plain values; raises InputError listing all faults."""
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {_plain(fault)}" for fault in error.errors()]
        raise InputError(f"recipe: {summarise(faults)}") from None


class _TwiceError(Exception):
    """A key that a mapping has twice, with its lines."""


class _Loader(yaml.SafeLoader):
    """YAML without the silence about a key that is there twice, of which the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """The mapping of a node; raises if a key is there twice."""
        lines: dict[object, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in lines:
                raise _TwiceError(f"{name} twice (lines {lines[name]} and {line})")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping that a YAML recipe file holds, unchecked."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    except _TwiceError as error:
        raise InputError(f"recipe {path} has the key {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {path} does not hold a mapping")
    return values


def dump_recipe(recipe: Section, *, places: bool = True) -> str:
    """The recipe as YAML, every default spelled out; without `places` it does not tell where local inputs lie."""
    told = recipe.model_dump(mode="json")
    if not (places and told.get("places")):
        told.pop("places", None)
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True)


def _over(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    result = dict(defaults)
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _over(result[key], value) if nested else value
    return result


def _plain(fault: Any) -> str:
    return "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"]


def found_near(recipe: P, base: Path) -> P:
    """The recipe with local files that are not here but in the folder `base`."""

    def near(name: str | None) -> str | None:
        if name is None or Path(recipe.place(name)).exists():
            return name
        return str(base / name) if (base / name).exists() else name

    found: dict[str, Any] = {key: near(getattr(recipe, key)) for key in ("source", "target", "texts", "valid", "test")}
    found["other_texts"] = tuple(near(name) for name in recipe.other_texts)
    if isinstance(recipe, Recipe):
        found["same_size_source"] = near(recipe.same_size_source)
    return recipe.model_copy(update=found)
