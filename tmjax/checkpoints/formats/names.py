"""Names of tensors as they are stored, matched with those of a family's table.

A prefix says how a checkpoint was saved, not what it is: `torch.compile` and distributed wrappers put one before every
name or into it, and a base model (`LlamaModel`, `GPT2Model`) is saved without the one that its language model has.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from tmjax.checkpoints.formats.safetensors import Weights
from tmjax.checkpoints.formats.weights import Renamed
from tmjax.errors import CheckpointError, summarise
from tmjax.models.spec import DecoderSpec, ParamSpec

#: Parts of a name that wrappers add, wherever they stand.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: Largest number of parts at the beginning of all names that may be left out: `module.`, `model.`, both.
_LEADING = 3


def unwrapped(name: str) -> str:
    """A name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def base_prefix(rows: Iterable[ParamSpec]) -> str:
    """The first part, with its dot, of all names of a family but the head's: what a base model is saved without."""
    embedding = next(row for row in rows if row.path == "embed.weight")
    return embedding.hf.split(".")[0] + "."


def _renamings(names: Collection[str], prefix: str, heads: Collection[str]) -> Iterable[Callable[[str], str]]:
    """Ways to read all names, the plainest first."""
    for leading in range(_LEADING):
        begins = {tuple(name.split(".")[:leading]) for name in names}
        if len(begins) > 1 or any(name.count(".") < leading for name in names):
            return

        def stripped(name: str, leading: int = leading) -> str:
            return ".".join(name.split(".")[leading:])

        yield stripped
        rest = [stripped(name) for name in names]
        if not any(name.startswith(prefix) for name in rest):
            yield lambda name, strip=stripped: strip(name) if strip(name) in heads else prefix + strip(name)


def matched(index: Weights, rows: tuple[ParamSpec, ...], spec: DecoderSpec) -> tuple[Weights, tuple[str, ...]]:
    """Reads stored names as those of the table.

    Args:
        index: Tensors under the names that they are stored under.
        rows: The family's table.
        spec: The architecture that the config describes.

    Returns:
        The tensors under the renaming that puts most of them in the table, unchanged if their own names do, and notes
        on the renaming.

    Raises:
        CheckpointError: Two stored names are one in the table.
    """
    table_names = {name for row in rows for name in row.names(spec)}
    plain = {name: unwrapped(name) for name in index}
    prefix = base_prefix(rows)
    heads = {name for row in rows if row.path.startswith("head.") for name in row.names(spec)}
    ways = list(_renamings(list(plain.values()), prefix, heads))
    best = max(ways, key=lambda way: sum(way(name) in table_names for name in plain.values()), default=str)
    stored: dict[str, list[str]] = defaultdict(list)
    for name, bare in plain.items():
        stored[best(bare)].append(name)
    twice = [f"{' and '.join(names)} are both {name}" for name, names in stored.items() if len(names) > 1]
    if twice:
        raise CheckpointError(f"{index.directory}: {summarise(twice)}")
    if all(name == names[0] for name, names in stored.items()):
        return index, ()
    example = next(f"{names[0]} is read as {name}" for name, names in stored.items() if name != names[0])
    return Renamed(index, {name: names[0] for name, names in stored.items()}), (f"names of tensors: {example}",)
