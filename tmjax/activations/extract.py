"""`extract_activations`: two models read the same texts, row by row."""

from pathlib import Path

from tmjax.activations.capture import CaptureOptions, capture
from tmjax.activations.store import Activations
from tmjax.checkpoints.model import Model
from tmjax.files.atomic import atomic_directory
from tmjax.models.sites import SITES
from tmjax.text.documents import Texts
from tmjax.text.rows import Pooling, pair_rows, sample_rows
from tmjax.text.tokenizer import load_tokenizer


def extract_activations(
    target: Model,
    source: Model,
    texts: Texts,
    out: str | Path,
    *,
    pooling: Pooling = "span",
    max_tokens: int = 512,
    max_rows: int | None = None,
    options: CaptureOptions | None = None,
    overwrite: bool = False,
) -> tuple[Activations, Activations]:
    """Captures the activations of two models at the same pieces of the same texts, row by row.

    Args:
        target: Target model.
        source: Source model.
        texts: Documents that both read.
        out: Directory, into which `target` and `source` are written.
        pooling: Pieces of text that are the rows: `span` or `sequence`.
        max_tokens: Largest number of tokens of a document that is read.
        max_rows: Largest number of rows, of which every document keeps its share; None is no limit.
        options: Sites, batches and devices.
        overwrite: Whether existing activations may be replaced.

    Returns:
        The stored activations of the target and of the source, `[layer, row, unit]` float32 of every site.

    Raises:
        InputError: The models share no piece of text, or `out` exists.
    """
    options = CaptureOptions() if options is None else options
    tokenizers = [load_tokenizer(model.directory, model.spec.vocab) for model in (target, source)]
    rows, documents = pair_rows(texts, tokenizers, pooling=pooling, max_tokens=max_tokens)
    if max_rows is not None:
        rows, documents = sample_rows(rows, documents, max_rows, seed=0)
    stores = []
    for name, model, read in zip(("target", "source"), (target, source), documents, strict=True):
        path = Path(out) / name
        sites = model.spec.sites if options.sites is None else options.sites
        with atomic_directory(path, overwrite=overwrite) as partial:
            capture(model.spec, model.params, rows, read, partial, options)
        stores.append(Activations(path, rows, model.spec.layers, {s: model.spec.axis_size(SITES[s]) for s in sites}))
    return stores[0], stores[1]
