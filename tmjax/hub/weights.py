"""Which reader a checkpoint directory needs: safetensors if there are any, PyTorch's format otherwise."""

from pathlib import Path

from tmjax.hub.tensors import INDEX_NAME, SINGLE_NAME, TensorIndex, Weights
from tmjax.hub.torch_bin import BIN_INDEX_NAME, BIN_SINGLE_NAME, TorchIndex


def has_safetensors(directory: Path) -> bool:
    """Whether a directory holds weights (or their index) in safetensors."""
    return any((Path(directory) / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def open_weights(directory: Path, ignored: tuple[str, ...] = ()) -> Weights:
    """The tensors of a checkpoint directory, read lazily; those whose names end in one of `ignored` are left out.

    Raises InputError if there are none or their format needs a package that is not there, CheckpointError if they are
    damaged or quantised.
    """
    directory = Path(directory)
    torch_files = any((directory / name).is_file() for name in (BIN_SINGLE_NAME, BIN_INDEX_NAME))
    reader = TorchIndex if torch_files and not has_safetensors(directory) else TensorIndex
    return reader(directory, ignored)
