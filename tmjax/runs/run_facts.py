"""Sections of the manifest of a run: typed facts of stages, inputs, scores and arms."""

from typing import Annotated, Any, TypeAlias, TypeVar

import pydantic
from pydantic import ConfigDict, Field

T = TypeVar("T")
#: A section that is not in the file until it has been recorded.
Recorded: TypeAlias = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
Number: TypeAlias = int | float
#: A cell of a table: a measurement, or a setting of a sweep.
Cell: TypeAlias = str | bool | int | float | None
#: Columns of the update table by the Hugging Face name of each tensor.
UpdateTable: TypeAlias = dict[str, dict[str, float]]
#: Recorded facts by operator.
OperatorFacts: TypeAlias = dict[str, dict[str, Any]]


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
    shared: Recorded[int] = None


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
    """Number of texts that a model was to generate, that were foreign to the target, that were kept.

    `cut`: kept ones that were cut before the model had ended them.
    """

    asked: int
    foreign: int
    kept: int
    cut: int = 0


class TeacherFacts(Facts):
    """Shared positions with teacher probabilities, of how many tokens, and the mean probability that was kept."""

    positions: int
    of: int
    mass: float


class EdgeFacts(Facts):
    """Mean negative log-likelihood (nats) of both models at one edge of the given texts: the first token or the end.

    `used`: whether the source's probabilities are used there.
    """

    source: float
    target: float
    used: bool


class ScheduleFacts(Facts):
    """Facts of one training with one number of steps and one learning rate.

    `valid_history` are pairs of step and validation bits per byte, `shapes` the shapes [rows, tokens] of its batches.
    `source_shares` are the mean weights of several sources in the teacher's probabilities.
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
    source_shares: Recorded[dict[str, float]] = None


class TrainingFacts(ScheduleFacts):
    """Facts of the training of one arm: the schedule that was chosen, the arm, and every schedule that was tried."""

    mode: str
    terms: list[str]
    texts_by: str | None
    init: str
    tried: list[ScheduleFacts]


class LoraFacts(Facts):
    """A LoRA of the result's change: rank, relative error by projection, and relative change of tensors without part.

    The relative error is ||D - B A|| / ||D|| of the change D of a tensor, the relative change ||D|| / ||W||.
    """

    rank: int
    errors: dict[str, float]
    left_out: dict[str, float]


class StepFacts(Facts):
    """Facts of a step of a run of several steps.

    `key` is the hash of everything that its model depends on, `model` the place of that model: below the run directory,
    or elsewhere where the step made none. `measured` are numbers of its command, `change` the paired difference of its
    model to the first target on the test texts.
    """

    kind: str
    key: str
    model: str
    measured: dict[str, Cell]
    change: Recorded[Change] = None


class BudgetFacts(Facts):
    """A budget of training and its plan.

    `tokens` are those of an arm, `tokens_per_second` the throughput that a time budget was converted with, `rounds` the
    number of learning rates and the steps of each round of the search, `steps` those of the last training.
    """

    tokens: int
    tokens_per_second: Recorded[float] = None
    tokens_per_step: int
    texts: int
    rounds: list[list[int]]
    steps: int


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
