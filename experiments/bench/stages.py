"""The stages of a merge, timed one by one on whatever devices are there: seconds, compilation, memory, FLOP/s."""

import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flops import forward_flops

from tmjax.activations.blocks import paired_blocks
from tmjax.activations.capture import CaptureOptions, capture, pooled_forward
from tmjax.align.alignment import Alignment, needed_sites
from tmjax.align.alignment import align as align_models
from tmjax.align.streaming import align_moments, gather
from tmjax.checkpoints.model import Model
from tmjax.models.decoder import ForwardPlan, bind
from tmjax.models.sites import SITES
from tmjax.models.spec import DecoderSpec, ParamSpec
from tmjax.recipes.merge import AlignmentOptions
from tmjax.runs.peak_memory import peak_rss_mib
from tmjax.sharding.mesh import Layout
from tmjax.text.buckets import bucket_length
from tmjax.text.rows import Rows, TokenisedDocument
from tmjax.transfer.chain import Merged
from tmjax.transfer.fuse import fuse as fuse_models

_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass
class Clock:
    """Seconds of stages, and how much of them was compilation; `saved` is called after each."""

    stages: dict[str, dict] = field(default_factory=dict)
    compiled: float = 0.0
    saved: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        """Listens to JAX's own account of compilation."""

        def add(event: str, seconds: float, **_: object) -> None:
            self.compiled += seconds if event == _COMPILED else 0.0

        jax.monitoring.register_event_duration_secs_listener(add)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict]:
        """Times what is done inside; yields the stage's entry for further figures."""
        before, started, entry = self.compiled, time.perf_counter(), {}
        yield entry
        entry |= {"seconds": time.perf_counter() - started, "compiling": self.compiled - before}
        held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        # Both are the process's largest so far, not the stage's own.
        entry["device_peak_gib"] = held and held / 2**30
        entry["host_peak_gib"] = peak_rss_mib() / 2**10
        self.stages[name] = entry
        print(f"{name}: {entry['seconds']:.2f} s, of which compiling {entry['compiling']:.2f}", file=sys.stderr)
        self.saved()


@dataclass(frozen=True)
class Setting:
    """What the stages share. All texts have the same number of tokens and of rows."""

    layout: Layout
    rows: Rows
    documents: list[TokenisedDocument]
    projections: Mapping[str, ParamSpec]
    dtype: jnp.dtype
    batch_tokens: int
    memory_mib: int | None
    options: AlignmentOptions
    peak: float | None
    folder: Path

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites whose activations the merge needs."""
        return needed_sites(self.projections.values())

    @property
    def lengths(self) -> list[int]:
        """Tokens of every text."""
        return [len(document.ids) for document in self.documents]

    def reading(self, *specs: DecoderSpec) -> CaptureOptions:
        """How these models read, for `capture` and `paired_blocks`."""
        whole = max(4 * s.layers * sum(s.axis_size(SITES[site]) for site in self.sites) for s in specs)
        return CaptureOptions(
            self.sites,
            self.batch_tokens,
            # Unless given, as much as lets a batch have all its tokens.
            self.memory_mib or 1 + whole * self.batch_tokens // 2**20,
            self.dtype,
            self.layout,
        )

    def texts_per_batch(self, spec: DecoderSpec) -> int:
        """As `capture` makes batches."""
        limit = self.reading(spec).batch_limit(spec, self.sites, self.documents)
        return max(1, min(limit // bucket_length(self.lengths[0]), len(self.documents)))

    def rate(self, flops: float, seconds: float) -> dict:
        """TFLOP/s of all devices, and their share of the peak (None where that is not known)."""
        rate = flops / seconds / 1e12
        return {"tflops": rate, "mfu": rate / (self.peak * self.layout.devices) if self.peak else None}


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "mesh"))
def final_states(
    spec: DecoderSpec, params: Mapping, ids_bt: jax.Array, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None = None
) -> jax.Array:
    """The model alone, up to its last states [B, T, embed]: what an extraction runs, without the head."""
    return bind(spec, params).run(ids_bt, ForwardPlan(dtype, mesh=mesh)).hidden


def forward(setting: Setting, clock: Clock, side: str, model: Model, repeats: int = 5) -> None:
    """Times one full batch on the device: the model alone, and with the averages of all sites."""
    spec, first = model.spec, setting.documents[0]
    tokens, multiple = len(first.ids), setting.layout.batch_multiple
    size = -(-setting.texts_per_batch(spec) // multiple) * multiple
    ids = np.zeros((size, bucket_length(tokens)), np.int32)
    ids[:, :tokens] = [setting.documents[i % len(setting.documents)].ids for i in range(size)]
    weights = np.zeros((size, len(first.rows), ids.shape[1]), np.float32)
    for row, positions in enumerate(first.rows):
        weights[:, row, positions] = 1 / len(positions)
    ids, weights = setting.layout.place_batch(ids), setting.layout.place_batch(weights)
    flops, mesh = forward_flops(model.family, spec, [tokens] * size), setting.layout.mesh
    calls = {
        "model": lambda: final_states(spec, model.params, ids, setting.dtype, mesh),
        "model and averages": lambda: pooled_forward(
            spec, model.params, ids, weights, setting.sites, setting.dtype, mesh
        ),
    }
    with clock.stage(f"forward {side}") as entry:
        entry["batch"] = list(ids.shape)
        for what, call in calls.items():
            jax.block_until_ready(call())
            seconds = []
            for _ in range(repeats):
                started = time.perf_counter()
                jax.block_until_ready(call())
                seconds.append(time.perf_counter() - started)
            middle = float(np.median(seconds))
            entry[what] = {"seconds_per_batch": middle} | setting.rate(flops, middle)


def extract(setting: Setting, clock: Clock, models: Mapping[str, Model], keep: bool) -> object:
    """Activations of both models kept on disk, or (`keep` False) the moments that alignment needs.

    What is kept is timed per model, warm: one batch is read before. Moments compile inside, which is left out of their
    FLOP/s.
    """
    flops = {side: forward_flops(model.family, model.spec, setting.lengths) for side, model in models.items()}
    if not keep:
        readers = [(model.spec, model.params, setting.documents) for model in models.values()]
        reading = setting.reading(*(model.spec for model in models.values()))
        with clock.stage("extract") as entry:
            blocks = paired_blocks(*readers, setting.rows, reading)
            held = jax.block_until_ready(gather(blocks, setting.projections.values()))
        entry |= setting.rate(sum(flops.values()), entry["seconds"] - entry["compiling"])
        return held
    found = []
    for side, model in models.items():
        reading = setting.reading(model.spec)
        few = setting.texts_per_batch(model.spec)
        chosen = setting.rows.document < few
        held = {name: getattr(setting.rows, name)[chosen] for name in ("document", "start", "end")}
        with tempfile.TemporaryDirectory(dir=setting.folder) as scratch:
            some = replace(setting.rows, **held), setting.documents[:few]
            capture(model.spec, model.params, *some, Path(scratch), reading)
        directory = setting.folder / f"activations-{side}"
        directory.mkdir()
        with clock.stage(f"extract {side}") as entry:
            found.append(capture(model.spec, model.params, setting.rows, setting.documents, directory, reading))
        entry |= setting.rate(flops[side], entry["seconds"])
    return found


def align(setting: Setting, clock: Clock, held: object, keep: bool) -> Alignment:
    """All plans, from what `extract` returned; the entry has the seconds and certificates of every site."""
    done: list[float] = []
    with clock.stage("align") as entry:
        started = time.perf_counter()
        how = {"mesh": setting.layout.mesh, "progress": lambda _d, _t: done.append(time.perf_counter() - started)}
        if keep:
            found = align_models(*held, setting.projections, setting.options, **how)
        else:
            found = align_moments(held, setting.projections, setting.options, **how)
        certificates = found.certificates()
        entry["sites"] = {
            site: {"seconds": seconds} | certificates.get(site, {})
            for site, seconds in zip(setting.sites, np.diff(done, prepend=0.0).tolist(), strict=True)
        }
    return found


def fuse(clock: Clock, alignment: Alignment, models: Mapping[str, Model], alpha: float) -> Merged:
    """Transport and fusion with one alpha; the entry has the least and largest part of the source in a tensor."""
    with clock.stage("fuse") as entry:
        fused = fuse_models(alignment, models["target"], models["source"], alpha=alpha)
        jax.block_until_ready(dict(fused.model.params))
        parts = [row["source_part"] for row in fused.table.values()]
        entry |= {"alpha": alpha, "tensors": len(parts), "source_part": [min(parts), max(parts)]}
    return fused
