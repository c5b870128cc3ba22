"""The manifest of a run: a typed model of `manifest.json`.

Optional sections are left out of the file until something is recorded in them. Unknown sections and values of the wrong
type are refused, so that every written manifest can be read again.
"""

import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import pydantic
from pydantic import Field

from tmjax.errors import InputError, summarise
from tmjax.files.jsonfile import read_json
from tmjax.runs.run_facts import (
    AlignmentFacts,
    BudgetFacts,
    Cell,
    Change,
    CoefficientFacts,
    ControlFacts,
    EdgeFacts,
    EvaluationFacts,
    Facts,
    ForgettingFacts,
    GeneratedFacts,
    InputFacts,
    LoraFacts,
    OperatorFacts,
    Output,
    PlanFacts,
    Recorded,
    SourceGain,
    Stage,
    StepFacts,
    SweepFacts,
    TeacherFacts,
    TrainingFacts,
    Unfinished,
    UpdateTable,
)

MANIFEST = "manifest.json"
#: Number of the layout of the file; raised when older runs cannot be read any more.
FORMAT = 2
_PACKAGES = ("jax", "flax", "ott-jax", "transformers", "orbax-checkpoint", "numpy")
_ENVIRONMENT = ("mesh", "devices", "processes", "platform")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide numbers."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


class Manifest(AlignmentFacts):
    """The record of a run.

    `key` are the hashes of recipe and inputs, which identify a run; mesh, devices, processes and platform are
    those of the latest work. `commands` are the command lines that decided it, the output by its last name. The facts
    of an alignment are the run's own; a sweep has several in `shared`. `gain_by_source` is the gain due to each of
    several sources: bits per byte of the arm without it minus those of the result.
    """

    format: int = FORMAT
    tmjax: str
    seed: int
    inputs: dict[str, InputFacts]
    notes: dict[str, list[str]] = Field(default_factory=dict)
    evaluation: dict[str, EvaluationFacts] = Field(default_factory=dict)
    source_gain: SourceGain | None = None
    gain_by_source: Recorded[dict[str, Change]] = None
    update: UpdateTable = Field(default_factory=dict)
    alignment: dict[str, PlanFacts] = Field(default_factory=dict)
    mesh: dict[str, int]
    devices: int
    processes: Recorded[int] = None
    platform: str
    versions: dict[str, str] = Field(default_factory=versions)
    key: dict[str, str]
    commands: Recorded[list[str]] = None
    stages: dict[str, Stage] = Field(default_factory=dict)
    outputs: dict[str, Output] = Field(default_factory=dict)
    unfinished: Recorded[Unfinished] = None
    coefficients: Recorded[CoefficientFacts] = None
    operators: Recorded[OperatorFacts] = None
    controls: Recorded[dict[str, ControlFacts]] = None
    forgetting: Recorded[dict[str, ForgettingFacts]] = None
    generated: Recorded[dict[str, GeneratedFacts]] = None
    teacher: Recorded[dict[str, TeacherFacts]] = None
    edges: Recorded[dict[str, EdgeFacts]] = None
    budget: Recorded[BudgetFacts] = None
    lora: Recorded[LoraFacts] = None
    training: Recorded[dict[str, TrainingFacts]] = None
    steps: Recorded[dict[str, StepFacts]] = None
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

    Raises InputError if it has another format than this version's, or is not valid.
    """
    values = read_manifest(path)
    try:
        return None if values is None else Manifest.model_validate(values)
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise InputError(f"{path / MANIFEST} is no manifest of tmjax: {summarise(faults)}") from None
