"""The difference of two checkpoints as a LoRA: of every projection the best approximation at a rank.

The change of a weight is D. Its r largest singular directions give B A with the least Frobenius norm of D - B A (Eckart
and Young 1936). They come from the eigenvectors of D D^T or D^T D, whichever is smaller, in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmjax.checkpoints.formats.adapter_writer import Matrices, module_of, write_lora
from tmjax.checkpoints.headers import CheckpointHeaders
from tmjax.checkpoints.hf import open_checkpoint, read_finite
from tmjax.errors import CheckpointError, InputError, summarise
from tmjax.files.atomic import atomic_directory
from tmjax.models.spec import ParamSpec


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    Attributes:
        errors: Relative Frobenius error of every projection's change, by the name of its tensor; 0 where the rank is
            enough.
        left_out: Other tensors that changed, and how much relative to their norm: the adapter has no part of them.
    """

    errors: dict[str, float]
    left_out: dict[str, float]


def truncated(change_oi: np.ndarray, rank: int) -> tuple[Matrices, float]:
    """Approximates a matrix at a rank.

    Args:
        change_oi: The matrix D [out, in], float32.
        rank: The rank r.

    Returns:
        A [r, in] and B [out, r], of equal norms by direction, with rows and columns of zeros beyond the matrix's own
        rank; and the relative Frobenius error of B A.
    """
    change = change_oi.astype(np.float64)
    out, into = change.shape
    gram = change @ change.T if out <= into else change.T @ change
    values, vectors = np.linalg.eigh(gram)
    count = min(rank, len(values))
    order = np.argsort(values)[::-1][:count]
    # Of B and A each has the root of the singular value.
    size = np.maximum(values[order], 0.0) ** 0.25
    chosen, inverse = vectors[:, order], np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    if out <= into:
        b, a = chosen * size, (chosen.T @ change) * inverse[:, None]
    else:
        b, a = (change @ chosen) * inverse, chosen.T * size[:, None]
    norm = np.linalg.norm(change)
    error = float(np.linalg.norm(change - b @ a) / norm) if norm else 0.0
    a_ri, b_or = np.zeros((rank, into), np.float32), np.zeros((out, rank), np.float32)
    a_ri[:count], b_or[:, :count] = a, b
    return (a_ri, b_or), error


def _same(base: CheckpointHeaders, changed: CheckpointHeaders) -> None:
    """Raises CheckpointError if two checkpoints differ in tensors or shapes."""
    differ = [name for name in base.index if name not in changed.index]
    differ += [name for name in changed.index if name not in base.index]
    differ += [n for n in base.index if n in changed.index and base.index[n].shape != changed.index[n].shape]
    if differ:
        raise CheckpointError(
            f"{changed.directory} and its base {base.directory} differ in tensors or shapes: {summarise(differ)}"
        )


def _modules(opened: CheckpointHeaders) -> Iterator[tuple[str, ParamSpec]]:
    """Yields the tensors of all projections, each once, and a row of the table that lies in it."""
    seen: set[str] = set()
    for row in opened.family.params(opened.spec):
        if row.role is None or len(row.axes) != 2 or row.per_entry:
            continue
        for name in row.names(opened.spec):
            if name not in seen:
                seen.add(name)
                yield name, row


def export_lora(
    base: Path, changed: Path, out: Path, *, rank: int, base_name: str, overwrite: bool = False
) -> LoraExport:
    """Writes the difference of two checkpoints of one architecture as a PEFT adapter.

    Args:
        base: Hugging Face directory of the model that the adapter belongs to.
        changed: Hugging Face directory of the changed model.
        out: Output directory.
        rank: Rank of every update.
        base_name: The base model's name in the adapter.
        overwrite: Whether an existing output may be replaced.

    Returns:
        Errors of the approximation, and changes that it leaves out.

    Raises:
        InputError: The rank is not positive, or no projection changed.
        CheckpointError: The two differ in tensors or shapes.
    """
    if rank < 1:
        raise InputError(f"the rank of an adapter must be 1 or more, not {rank}")
    with atomic_directory(out, overwrite=overwrite) as partial:
        return write_difference(base, changed, partial, rank=rank, base_name=base_name)


def write_difference(base: Path, changed: Path, directory: Path, *, rank: int, base_name: str) -> LoraExport:
    """Writes the difference of two checkpoints as `export_lora` does, into an existing folder; see there."""
    old, new = open_checkpoint(base), open_checkpoint(changed)
    _same(old, new)

    def change(name: str) -> np.ndarray:
        before, after = (read_finite(each.index, name).astype(np.float32) for each in (old, new))
        return after - before

    errors: dict[str, float] = {}
    matrices: dict[str, Matrices] = {}
    targets: dict[str, None] = {}
    projections = dict(_modules(old))
    transposed = any(row.part is not None and row.part.transposed for row in projections.values())
    for name, row in projections.items():
        difference = change(name)
        matrices[name], errors[name] = truncated(difference.T if transposed else difference, rank)
        if difference.any():
            targets[module_of(row.hf)] = None
    if not targets:
        raise InputError(f"no projection of {changed} differs from {base}; there is nothing to write as a LoRA")
    kept = {
        name.removesuffix(".weight"): x for name, x in matrices.items() if module_of(projections[name].hf) in targets
    }
    left_out = {}
    for name in old.index:
        if name not in projections and (difference := change(name)).any():
            norm = float(np.linalg.norm(read_finite(old.index, name).astype(np.float32)))
            left_out[name] = float(np.linalg.norm(difference)) / max(norm, 1e-30)
    settings = {"fan_in_fan_out": transposed, "rank_pattern": {}, "alpha_pattern": {}}
    write_lora(directory, kept, targets, base=base_name, rank=rank, alpha=float(rank), **settings)
    return LoraExport(errors, left_out)
