"""The manifest of a run: a typed model of everything that `manifest.json` holds.

Optional sections are left out of the file while nothing has been recorded in them. A section that this version does not
know, or one of the wrong kind, is refused, so that what is written can always be read again.
"""

import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from tmjax.errors import InputError, summarise
from tmjax.files.jsonfile import read_json

MANIFEST = "manifest.json"
#: Number of the layout of the file; raised when a run of an older version cannot be read any more.
FORMAT = 2
_PACKAGES = ("jax", "flax", "ott-jax", "transformers", "orbax-checkpoint", "numpy")
_ENVIRONMENT = ("mesh", "devices", "processes", "platform")

T = TypeVar("T")
#: A section that is not in the file until it has been recorded.
Recorded: TypeAlias = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
Number: TypeAlias = int | float
#: A cell of a table: a measurement, or a setting of a sweep.
Cell: TypeAlias = str | bool | int | float | None
#: By tensor (its Hugging Face name), the columns of what a merge did to it.
UpdateTable: TypeAlias = dict[str, dict[str, float]]
#: By operator, the facts that it records.
OperatorFacts: TypeAlias = dict[str, dict[str, Any]]


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide numbers."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


class Facts(pydantic.BaseModel):
    """A section of the manifest: named fields, no others, checked when they are set."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_by_name=True, serialize_by_alias=True)


class Stage(Facts):
    """Time and memory of a finished stage; `reused` if the latest command found its output intact."""

    seconds: float
    peak_rss_mib: float
    reused: bool


class Output(Facts):
    """Input hash of a finished stage, and the size of every file that it wrote."""

    key: str
    files: dict[str, int]


class Unfinished(Facts):
    """The output that a stage is writing, and the files that are about to be renamed into place."""

    output: str
    files: list[str]


class InputFacts(Facts):
    """An input as the recipe names it, and the hash of its content."""

    path: str
    sha256: str


class EvaluationFacts(Facts):
    """Score of one arm on the test texts.

    `unknown_share` and `changed_share` of the bytes are hidden or changed by its tokenizer.
    """

    bits_per_byte: float
    ci95: list[float]
    documents: int
    bytes: int
    tokens: int
    unknown_share: Recorded[float] = None
    changed_share: Recorded[float] = None


class SourceGain(Facts):
    """Gain over the best control, with its interval, and as a fraction of the gap between target and source."""

    bits_per_byte: float
    ci95: list[float]
    fraction_of_gap: float | None
    fraction_ci95: list[float] | None
    best_control: str


class Change(Facts):
    """A difference in bits per byte with its paired 95% interval."""

    bits_per_byte: float
    ci95: list[float]


class ForgettingFacts(Facts):
    """Scores on other texts before and after a merge (`merged`) or an adaptation (`adapted`)."""

    target: float
    merged: Recorded[float] = None
    adapted: Recorded[float] = None
    change: Change
    documents: int
    sha256: str


class RowFacts(Facts):
    """Number of paired rows of activations, of how many documents, and the pooling that made them.

    `shared` is the number of rows from which these were chosen; None where all were taken.
    """

    documents: int
    rows: int
    pooling: str
    shared: int | None = None


class PlanFacts(Facts):
    """Certificates of the plans of one site; maps, which have no marginals, have no marginal error."""

    problems: int
    converged: int
    max_marginal_error: float | None
    max_iterations: int
    log_domain: int
    pairs: int
    stored: str | None


class LayerPlanFacts(Facts):
    """Share of a layer plan's mass that was left out: mean and worst target layer."""

    dropped_mean: float
    dropped_max: float


class HeadCounts(Facts):
    """Query heads and key-value heads of a model."""

    heads: int
    kv_heads: int


class AlignmentFacts(Facts):
    """Facts of one alignment: rows, certificates by site, layer plans by projection, heads by model."""

    rows: Recorded[RowFacts] = None
    alignment: Recorded[dict[str, PlanFacts]] = None
    layer_plans: Recorded[dict[str, LayerPlanFacts]] = None
    attention: Recorded[dict[str, HeadCounts]] = None


class Coefficient(Facts):
    """Coefficients of a projection, the mean over layers where they were learned."""

    alpha: float
    beta: float


class TrialFacts(Facts):
    """Coefficients [alpha, beta] by role that were tried, and the validation loss that they gave."""

    loss: float
    coefficients: dict[str, list[float]]


class CoefficientFacts(Facts):
    """Chosen coefficients by role, their validation bits per byte (None: they were given), and every trial."""

    by_role: dict[str, Coefficient]
    valid_bits_per_byte: float | None
    trials: list[TrialFacts]


class ControlFacts(CoefficientFacts):
    """Facts of the merge of one control arm."""

    by_role: dict[str, Coefficient] = Field(default_factory=dict)
    valid_bits_per_byte: float | None = None
    trials: list[TrialFacts] = Field(default_factory=list)
    update: UpdateTable
    operators: OperatorFacts = Field(default_factory=dict)


class GeneratedFacts(Facts):
    """Number of texts that a model was to generate, that were foreign to the target, and that were kept."""

    asked: int
    foreign: int
    kept: int


class TeacherFacts(Facts):
    """Shared positions with teacher probabilities, of how many tokens, and the mean probability that was kept."""

    positions: int
    of: int
    mass: float


class ScheduleFacts(Facts):
    """Facts of one training with one number of steps and one learning rate.

    `valid_history` are pairs of step and validation bits per byte, `shapes` the shapes [rows, tokens] of its batches.
    """

    lr: float
    folder: str
    planned_steps: int
    steps: int
    stopped_early: bool
    best_step: int
    valid_bits_per_byte: float | None
    valid_history: list[list[Number]]
    shapes: list[list[int]]
    texts: int
    source_layers: Recorded[list[int]] = None
    explained_at_start: Recorded[list[float]] = None
    teacher_positions: Recorded[int] = None


class TrainingFacts(ScheduleFacts):
    """Facts of the training of one arm: the schedule that was chosen, the arm, and every schedule that was tried."""

    mode: str
    terms: list[str]
    texts_by: str | None
    init: str
    tried: list[ScheduleFacts]


class BestSetting(Facts):
    """The best setting of a sweep: its number, values, validation bits per byte and coefficients by role."""

    setting: int
    values: dict[str, Cell]
    valid_bits_per_byte: float
    coefficients: dict[str, Coefficient]


class SweepFacts(Facts):
    """Facts of a sweep: swept keys, numbers of settings and of groups that share plans, compilations, times."""

    keys: list[str]
    settings: int
    random: int | None
    groups: int
    devices: int
    failed: int
    compilations: int
    compile_seconds: float
    seconds_per_setting: float
    best: BestSetting
    test_compilations: Recorded[int] = None


class Manifest(AlignmentFacts):
    """Everything that a run directory says of itself.

    `key` are the hashes of recipe and inputs, by which a run is known again; mesh, devices, processes and platform are
    those of the latest work. The facts of an alignment are the run's own; a sweep has several in `shared`.
    """

    format: int = FORMAT
    tmjax: str
    seed: int
    inputs: dict[str, InputFacts]
    notes: dict[str, list[str]] = Field(default_factory=dict)
    evaluation: dict[str, EvaluationFacts] = Field(default_factory=dict)
    source_gain: SourceGain | None = None
    update: UpdateTable = Field(default_factory=dict)
    alignment: dict[str, PlanFacts] = Field(default_factory=dict)
    mesh: dict[str, int]
    devices: int
    processes: Recorded[int] = None
    platform: str
    versions: dict[str, str] = Field(default_factory=versions)
    key: dict[str, str]
    stages: dict[str, Stage] = Field(default_factory=dict)
    outputs: dict[str, Output] = Field(default_factory=dict)
    unfinished: Recorded[Unfinished] = None
    coefficients: Recorded[CoefficientFacts] = None
    operators: Recorded[OperatorFacts] = None
    controls: Recorded[dict[str, ControlFacts]] = None
    forgetting: Recorded[dict[str, ForgettingFacts]] = None
    generated: Recorded[dict[str, GeneratedFacts]] = None
    teacher: Recorded[dict[str, TeacherFacts]] = None
    training: Recorded[dict[str, TrainingFacts]] = None
    sweep: Recorded[SweepFacts] = None
    shared: Recorded[dict[str, AlignmentFacts]] = None
    solvers: Recorded[list[dict[str, Cell]]] = None
    solver_sites: Recorded[list[dict[str, Cell]]] = None

    def to_json(self, include: set[str] | None = None) -> dict[str, Any]:
        """Returns the manifest, or the sections in `include`, as it stands in the file: `format` first."""
        values = self.model_dump(include=include)
        return {"format": values["format"], **values} if "format" in values else values

    def run_in(self, other: "Manifest") -> None:
        """Takes over mesh, devices, processes and platform of another manifest."""
        for name in _ENVIRONMENT:
            setattr(self, name, getattr(other, name))

    def record(self, section: str, name: str, facts: Facts) -> None:
        """Sets one entry of a section that maps names to facts, such as `controls`."""
        setattr(self, section, {**(getattr(self, section) or {}), name: facts})

    def shared_facts(self, label: str) -> AlignmentFacts:
        """Returns the facts that variants of a sweep share under this label, to be recorded into."""
        if self.shared is None or label not in self.shared:
            self.record("shared", label, AlignmentFacts())
        return self.shared[label]


#: Writes facts of a finished stage into the manifest of its run.
Record: TypeAlias = Callable[[Manifest], None]
#: Writes facts of a stage that leads to an alignment; a manifest takes them too.
AlignmentRecord: TypeAlias = Callable[[AlignmentFacts], None]


def find_manifest(path: Path) -> dict[str, Any] | None:
    """Returns the JSON of a run directory's manifest, of whatever format; None if `path` is not a run."""
    if not (path / MANIFEST).is_file():
        return None
    values = read_json(path / MANIFEST)
    return values if "tmjax" in values and "stages" in values else None


def is_current(values: Mapping[str, Any]) -> bool:
    """Returns whether the JSON of a manifest has the format of this version."""
    return values.get("format") == FORMAT


def refuse_other_format(path: Path, values: Mapping[str, Any]) -> None:
    """Raises InputError if the JSON of a manifest has another format than this version's."""
    if not is_current(values):
        raise InputError(
            f"{path} is a run of format {values.get('format', 1)}, made by tmjax {values['tmjax']}; this version reads "
            f"format {FORMAT}: run its recipe again, into another --out or with --overwrite"
        )


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Returns the JSON of a run directory's manifest, as reports read it; None if `path` is not a run.

    Raises InputError if it has another format than this version's.
    """
    values = find_manifest(path)
    if values is not None:
        refuse_other_format(path, values)
    return values


def load_manifest(path: Path) -> Manifest | None:
    """Returns the manifest of a run directory; None if `path` is not a run.

    Raises InputError if it has another format than this version's, or was changed by hand into none at all.
    """
    values = read_manifest(path)
    try:
        return None if values is None else Manifest.model_validate(values)
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise InputError(f"{path / MANIFEST} is no manifest of tmjax: {summarise(faults)}") from None
