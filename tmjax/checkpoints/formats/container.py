"""Directories that are no Hugging Face checkpoint, or several: names of their content, with advice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tmjax.checkpoints.formats.adapter import ADAPTER_CONFIG
from tmjax.checkpoints.formats.safetensors import INDEX_NAME, SINGLE_NAME
from tmjax.checkpoints.formats.torch_bin import BIN_INDEX_NAME, BIN_SINGLE_NAME
from tmjax.errors import InputError
from tmjax.files.jsonfile import read_json
from tmjax.models.families.quantised import is_read

#: Files beside `config.json` in which quantisation tools record their settings.
_PACKED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_ADVICE = "give the Hugging Face checkpoint that it was made from"
#: Beginnings of names of files without weights that a trainer leaves beside a checkpoint.
_TRAINING = ("optimizer", "scheduler", "rng_state", "scaler")
#: Files of formats that are not read, in order of precedence: pattern, kind, advice.
_OTHERS = (
    ("zero_to_fp32.py", "a sign of a DeepSpeed checkpoint", "run it and give the directory that it writes"),
    ("*/*.distcp", "a part of a sharded FSDP checkpoint", "put it together with accelerate merge-weights"),
    ("*.gguf", "a GGUF file, whose weights are packed", _ADVICE),
    ("consolidated*.safetensors", "Mistral's own format", "give the checkpoint in Hugging Face's format"),
    ("consolidated*.pth", "Meta's own format", "give the checkpoint in Hugging Face's format"),
    ("*.pth", "a PyTorch file that is not in Hugging Face's format", "save it with save_pretrained"),
    ("*.pt", "a PyTorch file that is not in Hugging Face's format", "save it with save_pretrained"),
    ("*.onnx", "an ONNX model", _ADVICE),
    ("onnx/*.onnx", "an ONNX model", _ADVICE),
    ("tf_model*.h5", "TensorFlow's weights", "save it with save_pretrained of the PyTorch class, from_tf=True"),
    ("flax_model*.msgpack", "Flax weights", "save it with save_pretrained of the PyTorch class, from_flax=True"),
    ("rust_model.ot", "rust-bert's weights", _ADVICE),
    ("model_index.json", "a diffusion pipeline", "give a language model"),
    ("model*.safetensors", f"a shard without {INDEX_NAME}", "fetch the index or save it again"),
    ("pytorch_model*.bin", f"a shard without {BIN_INDEX_NAME}", "fetch the index or save it again"),
    (
        "*.safetensors",
        f"a safetensors file that is not named {SINGLE_NAME}",
        "rename the file if it is the whole model",
    ),
)


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _first(directory: Path, pattern: str) -> Path | None:
    return min((file for file in directory.glob(pattern) if not file.name.startswith(_TRAINING)), default=None)


def explain(directory: Path, wrong: str) -> str:
    """Explains in one line the kind of a directory that lacks a file, with advice.

    Args:
        directory: An existing directory.
        wrong: The fault, such as `DIR/config.json does not exist`.

    Returns:
        The fault, the kind of the directory and the advice.
    """
    if (directory / ADAPTER_CONFIG).is_file():
        base = _json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        return (
            f"{wrong}: it holds an adapter (LoRA){of}, not a model; fold it into its base model with peft's"
            " merge_and_unload and give what save_pretrained writes"
        )
    for pattern, kind, advice in _OTHERS:
        file = _first(directory, pattern)
        if file is not None:
            return f"{wrong}: {file.relative_to(directory)} is {kind}; {advice}"
    if not any(directory.iterdir()):
        return f"{wrong}: it is empty; give the directory of a Hugging Face checkpoint"
    nested = _first(directory, "*/config.json")
    if nested is not None:
        return f"{wrong}: there is one in {nested.parent}, give that directory"
    return f"{wrong}; give the directory of a Hugging Face checkpoint"


def any_weights(directory: Path) -> bool:
    """Whether a directory holds weights in some format that is not read, or an adapter."""
    return (directory / ADAPTER_CONFIG).is_file() or any(_first(directory, pattern) for pattern, *_ in _OTHERS)


def no_weights(directory: Path) -> InputError:
    """The error for a directory without a file of weights that is read."""
    return InputError(
        explain(directory, f"{directory} has neither {SINGLE_NAME} nor {BIN_SINGLE_NAME} nor an index of shards")
    )


def packing_beside(directory: Path) -> dict[str, Any] | None:
    """Returns the settings of quantised weights that a file beside the config declares, if they are read."""
    for name in _PACKED:
        settings = _json(directory / name)
        settings = settings.get("quantization", settings)
        if is_read(settings):
            return settings
    return None


def refuse_packed(directory: Path) -> None:
    """Raises InputError if a file beside the config declares quantised weights that are not read."""
    for name in _PACKED:
        if (directory / name).is_file():
            settings = _json(directory / name)
            settings = settings.get("quantization", settings)
            settings = settings if isinstance(settings, dict) else {}
            if is_read(settings):
                continue
            details = [str(settings[key]) for key in ("quant_algo", "quant_method") if settings.get(key)]
            details += [f"{settings['bits']} bits"] if settings.get("bits") else []
            if not details and "kv_cache_quant_algo" in settings:
                continue  # the cache of generation is quantised, not the weights
            raise InputError(
                f"{directory}: the checkpoint is quantised ({', '.join((name, *details))}); dequantise it first or give"
                " the checkpoint that it was made from"
            )


def container_notes(directory: Path) -> tuple[str, ...]:
    """Notes on files of a checkpoint directory that are not read, where that could surprise."""
    return tuple(_notes(directory))


def _notes(directory: Path) -> Iterator[str]:
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    torch_files = [name for name in (BIN_SINGLE_NAME, BIN_INDEX_NAME) if (directory / name).is_file()]
    if single.is_file() and index.is_file():
        yield f"{SINGLE_NAME} is read, {INDEX_NAME} beside it and its shards are not"
    if (single.is_file() or index.is_file()) and torch_files:
        yield f"the safetensors are read, {torch_files[0]} beside them is not"
    for pattern in ("consolidated*.safetensors", "original/*", "*.gguf"):
        copy = _first(directory, pattern)
        if copy is not None:
            yield f"{copy.relative_to(directory)} is another copy of the weights, which is not read"
    if (directory / ADAPTER_CONFIG).is_file():
        yield f"{ADAPTER_CONFIG} belongs to an adapter, which is not applied; the model is read as it is stored"
