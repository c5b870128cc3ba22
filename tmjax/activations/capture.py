"""Capturing: the jitted forward pools every site inside its scan, so unpooled activations are never kept."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tmjax.activations import store
from tmjax.errors import InputError, NonFiniteError
from tmjax.models.decoder import ForwardPlan, bind
from tmjax.models.sites import SITES
from tmjax.models.spec import DecoderSpec
from tmjax.sharding import hosts
from tmjax.sharding.memory import share_mib
from tmjax.sharding.mesh import Layout, constrain
from tmjax.text.buckets import Batch, bucket_length, bucketed
from tmjax.text.rows import Rows, TokenisedDocument
from tmjax.typing import Array, Params


@dataclass(frozen=True)
class CaptureOptions:
    """Selection of the captured activations, batches and devices of a capture.

    Attributes:
        sites: Sites; None: all that the models have.
        layers: Layers that `capture` stores, ascending; None: all.
        batch_tokens: Largest number of padded tokens in a batch.
        memory_mib: Memory of a batch's pooled activations, which may make it smaller; None: a share of the device's.
        dtype: Dtype of the forward pass.
        layout: Devices, on which the parameters must lie too; one device unless given.
    """

    sites: Sequence[str] | None = None
    batch_tokens: int = 8192
    memory_mib: int | None = None
    dtype: jnp.dtype = jnp.float32
    layout: Layout = field(default_factory=Layout)
    layers: tuple[int, ...] | None = None

    def batch_limit(self, spec: DecoderSpec, sites: Sequence[str], documents: Sequence[TokenisedDocument]) -> int:
        """Padded tokens of a batch: `batch_tokens`, or fewer where its rows' activations exceed the memory."""
        row_bytes = 4 * spec.layers * sum(spec.axis_size(SITES[site]) for site in sites)
        rows = max(len(document.rows) / bucket_length(len(document.ids)) for document in documents)  # per padded token
        memory = (self.memory_mib or share_mib(16, 48)) * 2**20
        return max(1, min(self.batch_tokens, int(memory / (row_bytes * max(rows, 1 / self.batch_tokens)))))


@functools.partial(jax.jit, static_argnames=("spec", "sites", "dtype", "mesh", "layers"))
def pooled_forward(
    spec: DecoderSpec,
    params: Params,
    ids_bt: Array,
    weights_brt: Array,
    sites: tuple[str, ...],
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    layers: tuple[int, ...] | None = None,
) -> dict[str, Array]:
    """Activations of each site averaged over tokens by `weights`: `[layer, B, R, unit]` float32.

    With a mesh they are split along B alone. `layers` are those that are returned; None: all.
    """

    def pool(x_btu: Array) -> Array:
        return jnp.einsum("brt,btu->bru", weights_brt, x_btu.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

    captured = bind(spec, params).run(ids_bt, ForwardPlan(dtype, sites, pool, mesh)).captured
    if layers is not None:
        captured = {site: x[np.asarray(layers)] for site, x in captured.items()}
    return {site: constrain(mesh, x, (None, "batch", None, None)) for site, x in captured.items()}


def _arrays(batch: Batch, documents: Sequence[TokenisedDocument], rows: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((batch.size, batch.tokens), np.int32)
    weights = np.zeros((batch.size, rows, batch.tokens), np.float32)
    for slot, number in enumerate(batch.documents):
        document = documents[number]
        ids[slot, : len(document.ids)] = document.ids
        for row, positions in enumerate(document.rows):
            weights[slot, row, positions] = 1.0 / len(positions)
    return ids, weights


def require_readable(spec: DecoderSpec, documents: Sequence[TokenisedDocument], sites: Sequence[str]) -> None:
    """Raises InputError unless all sites exist, all token ids are in the vocabulary and no text is too long."""
    unknown = [site for site in sites if site not in spec.sites]
    if unknown:
        raise InputError(f"no site {', '.join(unknown)}; the model's sites are {', '.join(spec.sites)}")
    largest = max(max(document.ids) for document in documents)
    if largest >= spec.vocab:
        raise InputError(f"the tokenizer gives id {largest}, but the model's vocabulary has {spec.vocab} entries")
    longest = max(len(document.ids) for document in documents)
    if spec.bound and longest > spec.max_positions:
        raise InputError(f"a text has {longest} tokens, {spec.bound}; lower activations.max_tokens")


def pooled_batches(
    spec: DecoderSpec,
    params: Params,
    documents: Sequence[TokenisedDocument],
    batches: Iterable[tuple[Batch, int]],
    *,
    sites: Sequence[str],
    dtype: jnp.dtype,
    layout: Layout,
    layers: tuple[int, ...] | None = None,
) -> Iterator[tuple[Batch, dict[str, Array]]]:
    """Each batch with its pooled activations, `[layer, slot, R, unit]` float32 of every site, on the devices.

    `batches` pairs a batch with R, the rows that each of its documents is padded to. While one is used the next is
    computed.
    """
    before: tuple[Batch, dict[str, Array]] | None = None
    for batch, rows in batches:
        ids, weights = (layout.place_batch(x) for x in _arrays(batch, documents, rows))
        started = batch, pooled_forward(spec, params, ids, weights, tuple(sites), dtype, layout.mesh, layers)
        if before is not None:
            yield before
        before = started
    if before is not None:
        yield before


def require_finite(site: str, values: np.ndarray) -> None:
    """Raises NonFiniteError if an activation is NaN or infinite."""
    if not np.isfinite(values).all():
        raise NonFiniteError(f"activations of site {site} hold NaN or infinity; the model overflows on these texts")


def capture(
    spec: DecoderSpec,
    params: Params,
    rows: Rows,
    documents: Sequence[TokenisedDocument],
    directory: Path,
    options: CaptureOptions | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> store.Activations:
    """Runs a model over all documents and writes its pooled activations.

    Of several processes, which share `directory`, each writes the rows of its documents.

    Args:
        spec: Architecture.
        params: Parameters by Flax path.
        rows: Pieces of text that are the rows.
        documents: The documents as the model reads them, with the tokens of every row.
        directory: Existing directory, into which `[layer, row, unit]` float32 of every site is written.
        options: Sites, batches and devices.
        progress: Called with the batches done and their number.

    Returns:
        The stored activations.

    Raises:
        InputError: A site or token id is unknown, or a text is too long.
        NonFiniteError: An activation is NaN or infinite.
    """
    options = CaptureOptions() if options is None else options
    sites, layout = spec.sites if options.sites is None else options.sites, options.layout
    require_readable(spec, documents, sites)
    if hosts.is_first():
        widths = {site: spec.axis_size(SITES[site]) for site in sites}
        store.create(directory, rows, spec.layers, widths, options.layers)
    hosts.barrier("activation store")
    counts = [len(document.rows) for document in documents]
    first_row = np.concatenate([[0], np.cumsum(counts)])
    limit = options.batch_limit(spec, sites, documents)
    used = [number for number, count in enumerate(counts) if count]
    lengths = [len(documents[n].ids) for n in used]
    batches = list(bucketed(lengths, batch_tokens=limit, multiple=layout.batch_multiple))
    batches = [Batch(tuple(used[i] for i in batch.documents), batch.size, batch.tokens) for batch in batches]
    widest: dict[int, int] = {}
    for batch in batches:
        widest[batch.tokens] = max(widest.get(batch.tokens, 1), *(counts[n] for n in batch.documents))
    padded = [(batch, widest[batch.tokens]) for batch in batches]
    settings = {"sites": sites, "dtype": options.dtype, "layout": layout, "layers": options.layers}
    pooled = pooled_batches(spec, params, documents, padded, **settings)
    for done, (batch, captured) in enumerate(pooled):
        for site, values in captured.items():
            for start, part in hosts.local_parts(values, axis=1):
                require_finite(site, part)
                own = batch.documents[start : start + part.shape[1]]
                blocks = {first_row[n]: part[:, slot, : counts[n]] for slot, n in enumerate(own)}
                store.write_rows(directory, site, blocks)
        progress(done + 1, len(batches))
    hosts.barrier("activations written")
    return store.read(directory)
