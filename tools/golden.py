"""Runs small merges and adaptations that use every part of the package, and records or compares what comes out.

    python -m tools.golden record runs/golden.json              # some minutes on two cores
    python -m tools.golden compare runs/golden.json             # bit for bit: exit status 1 if anything differs
    python -m tools.golden compare runs/golden.json --tolerance 1e-6
    python -m tools.golden store runs/golden.json tests/data/golden.json.gz

Recorded are, of every checkpoint that a case writes, the SHA-256, norm, largest entry and some entries of every tensor,
and bits per byte of every arm. Bit for bit holds on one machine with one version of JAX; between machines compare with
a tolerance, in units of a tensor's largest entry. A processor of another kind rounds otherwise, which solves and
training amplify: a case that was recorded on one is compared with the tolerance `OTHER_PROCESSOR` at least. A change of
the code that must not change a number is checked so.
"""

import gzip
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import safetensors.numpy
import typer
import yaml

from tmjax import cli
from tmjax.errors import InputError
from tmjax.files.atomic import write_bytes, write_json

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SWAHILI, WOLOF = EXPERIMENTS / "swahili", EXPERIMENTS / "wolof"
#: Texts of each file that a case reads.
TEXTS = {"calibration": 24, "valid": 12, "test": 16}
#: Least tolerance for a case that was recorded on a processor of another kind: 1.3e-5 has been measured,
OTHER_PROCESSOR = 2e-5
#: but for these cases, whose plans turn on the last bits: 2.6e-5, 4.7e-5 and 1.1e-4.
AMPLIFYING = {"regression": 5e-5, "full": 1e-4, "cover": 2e-4}
#: Entries of a tensor that are recorded.
ENTRIES = 8

_FIT: dict[str, Any] = {"alphas": [0.03, 0.1], "betas": [-0.05, 0.0]}
_SHORT: dict[str, Any] = {"mesh": "data=1", "evaluation": {"draws": 200}, "preset": "barycentric"}


def _merge(*, coefficients: Mapping[str, Any] | None = None, **recipe: Any) -> tuple[str, dict[str, Any]]:
    return "merge", _SHORT | {"coefficients": _FIT | dict(coefficients or {})} | recipe


_SOLVE: list[dict[str, Any]] = [
    {"transport": {}},
    {"embeddings": {"alphas": [0.1, 0.3], "kappas": [300.0]}},
    {"predictions": {"rounds": 2, "generated_texts": 6, "tokens": 12}},
]
_STREAM: list[dict[str, Any]] = [{"transport": {}}, {"residual_stream": {}}]
_TRAINING = {"steps": 20, "warmup": 4, "tokens_per_step": 512, "row_lengths": 1, "validate_every": 10, "lr": 3e-4}
_TRAINING |= {"patience": None}


def _adapt(mode: str, **recipe: Any) -> tuple[str, dict[str, Any]]:
    short = {"mesh": "data=1", "training": _TRAINING, "evaluation": {"draws": 200}}
    return "adapt", short | {
        "mode": mode,
        "generation": {"texts": 8, "tokens": 12},
        "distillation": {"weight": 1.0},
    } | recipe


#: Name of a case: its command and recipe, over the inputs of `_inputs`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "predictions": _merge(operators=_SOLVE, preset="predictions", controls=True),
    "predictions, wolof": _merge(operators=_SOLVE, preset="predictions"),
    "barycentric": _merge(controls=True),
    "paper": ("merge", _SHORT | {"preset": "paper", "allow_negligible": True}),
    "fixed alpha": ("merge", _SHORT | {"alpha": 0.05}),
    "one role": ("merge", _SHORT | {"alpha": 0.05, "operators": [{"transport": {"roles": ["o"]}}]}),
    "two devices": ("merge", _SHORT | {"alpha": 0.05, "mesh": "fsdp=2"}),
    "streaming": _merge(activations={"keep": False}, controls=True),
    "potentials": _merge(alignment={"feature_dtype": "float32", "memory_mib": 16, "layer_pairs": "coarse"}),
    "regression": _merge(operators=[{"regression": {}}], controls=True),
    "heads": _merge(alignment={"structure": "heads"}),
    "full": _merge(alignment={"structure": "full"}, operators=_STREAM, controls=True),
    "full, per layer": _merge(alignment={"structure": "full", "residual": "layer", "depth": "monotone"}),
    "cover": _merge(alignment={"solver": "cover"}),
    "signed": _merge(alignment={"solver": "signed"}),
    "learned": _merge(coefficients={"fit": "learned", "learning": {"steps": 6, "check_every": 3}}),
    "learned by unit": _merge(
        coefficients={"fit": "learned", "learning": {"steps": 6, "check_every": 3, "granularity": "unit"}}
    ),
    "base": _merge(operators=[{"transport": {"base": str(SWAHILI / "target"), "trust": 0.05}}]),
    "sft": _adapt("sft"),
    "guided": _adapt("guided", guidance={"metric": "fisher"}),
    "distilled": _adapt("distilled"),
    "source-written": _adapt("source-written"),
    "combined": _adapt("combined", controls=True),
    "residual-frozen": _adapt("residual-frozen", merge={"coefficients": _FIT}),
    "lora": _adapt("lora"),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").splitlines()[0])


def _inputs(folder: Path, pair: Path) -> dict[str, str]:
    """Models and the first texts of a bundled pair, as recipe keys."""
    names = {"calibration": "texts", "valid": "valid", "test": "test"}
    found = {"source": str(SWAHILI / "source"), "target": str(pair / "target")}
    for part, key in names.items():
        lines = (pair / f"texts/{pair.name}.{part}.jsonl").read_text(encoding="utf-8").splitlines()[: TEXTS[part]]
        file = folder / f"{pair.name}.{part}.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        found[key] = str(file)
    return found


def _tensor(value: np.ndarray) -> dict[str, Any]:
    """Facts of one tensor: hash of dtype, shape and bytes; norm, largest magnitude and entries spread over it."""
    head = f"{value.dtype} {value.shape}".encode()
    flat = value.reshape(-1).astype(np.float64)
    places = np.linspace(0, len(flat) - 1, min(ENTRIES, len(flat))).astype(int)
    return {
        "sha256": hashlib.sha256(head + value.tobytes()).hexdigest(),
        "norm": float(np.linalg.norm(flat)),
        "maximum": float(np.abs(flat).max()),
        "entries": [float(x) for x in flat[places]],
    }


def processor() -> str:
    """Returns the kind of the processor: which instructions it has decides the order of sums."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    named = [values[key] for key in ("vendor_id", "cpu family", "model", "stepping") if key in values]
    return " ".join(named or [platform.machine()])


def run_case(name: str, scratch: Path) -> dict[str, Any]:
    """Runs one case under `scratch`; returns facts of every tensor by checkpoint and bits per byte by arm."""
    command, recipe = CASES[name]
    folder = scratch / name.replace(",", "").replace(" ", "-")
    folder.mkdir(parents=True)
    out = folder / "run"
    file = folder / "recipe.yaml"
    inputs = _inputs(folder, WOLOF if "wolof" in name else SWAHILI)
    file.write_text(yaml.safe_dump(recipe | inputs | {"out": str(out)}), encoding="utf-8")
    code = cli.run([command, str(file)])
    if code:
        raise InputError(f"golden case {name!r} ended with exit status {code}")
    checkpoints = {}
    for weights in sorted(out.rglob("model.safetensors")):
        tensors = safetensors.numpy.load_file(weights)
        where = str(weights.parent.relative_to(out))
        checkpoints[where] = {key: _tensor(tensors[key]) for key in sorted(tensors)}
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return {
        "processor": processor(),
        "bits_per_byte": {arm: facts["bits_per_byte"] for arm, facts in manifest["evaluation"].items()},
        "checkpoints": checkpoints,
    }


def differences(stored: Mapping[str, Any], result: Mapping[str, Any], tolerance: float | None) -> list[str]:
    """Compares one case with what is stored: bit for bit, or within `tolerance` of a tensor's largest entry.

    Bits per byte may differ by `tolerance`, relative. Returns a line for every difference.
    """
    lines = []
    pairs = [("checkpoints", stored["checkpoints"], result["checkpoints"])]
    pairs += [
        (where, stored["checkpoints"][where], result["checkpoints"][where])
        for where in stored["checkpoints"].keys() & result["checkpoints"].keys()
    ]
    pairs.append(("arms", stored["bits_per_byte"], result["bits_per_byte"]))
    lines += [f"{what}: {sorted(a.keys() ^ b.keys())} only on one side" for what, a, b in pairs if a.keys() != b.keys()]
    for arm in stored["bits_per_byte"].keys() & result["bits_per_byte"].keys():
        a, b = stored["bits_per_byte"][arm], result["bits_per_byte"][arm]
        if abs(a - b) > (tolerance or 0.0) * a:
            lines.append(f"{arm}: {a} bits per byte before, {b} now")
    for where, a, b in pairs[1:-1]:
        for key in a.keys() & b.keys():
            if a[key].get("sha256") == b[key]["sha256"]:
                continue
            held = [a[key]["norm"], *a[key]["entries"]], [b[key]["norm"], *b[key]["entries"]]
            scale = max(a[key]["maximum"], 1e-30)
            worst = max(abs(x - y) for x, y in zip(*held, strict=True)) / scale if len(held[0]) == len(held[1]) else 1.0
            if tolerance is None or worst > tolerance:
                lines.append(f"{where} {key}: differs by {worst:.1e} of its largest entry (as far as recorded)")
    return lines


def read(file: Path) -> dict[str, Any]:
    """Reads a recording, compressed or not."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; write it with `record` first")
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return json.loads(content)


def _short(value: Any) -> Any:
    """The values of a recording with nine digits, and without hashes, which belong to one machine."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items() if key != "sha256"}
    return value


def _chosen(only: str | None) -> list[str]:
    names = [name.strip() for name in only.split(";")] if only else list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise InputError(f"no golden case {', '.join(unknown)}; there are {'; '.join(CASES)}")
    return names


Only = Annotated[str | None, typer.Option(help="Cases, separated by semicolons; all unless given.")]


@app.command()
def record(file: Path, only: Only = None) -> None:
    """Runs the cases that a JSON file does not hold yet, and adds what comes out to it after each."""
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in _chosen(only):
        if name not in held:
            with tempfile.TemporaryDirectory() as scratch:
                held[name] = run_case(name, Path(scratch))
            write_json(file, held)


@app.command()
def compare(
    file: Path,
    only: Only = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of a tensor's largest entry; bit for bit unless given.")
    ] = None,
) -> None:
    """Runs the cases and compares what comes out with a recorded file."""
    stored, lines = read(file), []
    with tempfile.TemporaryDirectory() as scratch:
        for name in _chosen(only):
            allowed = tolerance
            if tolerance is not None and stored[name].get("processor") != processor():
                allowed = max(tolerance, AMPLIFYING.get(name, OTHER_PROCESSOR))
                print(f"{name}: recorded on a processor of another kind, compared within {allowed}")
            found = differences(stored[name], run_case(name, Path(scratch)), allowed)
            lines += [f"{name}: {line}" for line in found]
            print(f"{name}: {len(found)} differences", flush=True)
    print("\n".join(lines))
    if lines:
        raise InputError(f"{len(lines)} golden outputs differ")


@app.command()
def store(file: Path, out: Path) -> None:
    """Writes a recording in the form in which the repository holds it: compressed, nine digits, without hashes."""
    content = json.dumps(_short(read(file)), separators=(",", ":")).encode()
    write_bytes(out, gzip.compress(content, mtime=0))


if __name__ == "__main__":
    sys.exit(cli.run(application=app, name="golden"))
