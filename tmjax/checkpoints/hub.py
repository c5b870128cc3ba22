"""Finding a checkpoint: a local directory or a hub id; its config, tokenizer and companion files."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmjax.checkpoints.formats.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from tmjax.checkpoints.formats.container import explain
from tmjax.checkpoints.formats.safetensors import INDEX_NAME, SINGLE_NAME
from tmjax.checkpoints.formats.torch_bin import BIN_INDEX_NAME, BIN_SINGLE_NAME
from tmjax.checkpoints.formats.weights import shard_names
from tmjax.errors import InputError
from tmjax.files.jsonfile import read_json

CONFIG_NAME = "config.json"
#: The model card.
README = "README.md"
#: Everything a checkpoint directory may hold beside weights and config that belongs to the model and is copied along.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model.v3",
    "tekken.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
#: Further chat templates, by name, which belong to the model like the main one.
TEMPLATES = "additional_chat_templates"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


_GGUF_ADVICE = "a GGUF file, whose weights are packed; give the Hugging Face checkpoint that it was made from"


def resolve(model: str, *, weights: bool = True) -> Path:
    """The local directory of `model`, a path or a hub id (downloaded through the shared cache; offline works).

    Of the hub's weights only files that are read are fetched: safetensors, PyTorch's files where there are none, and of
    several shards those that their index names; `weights` false fetches none. Raises InputError if it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if is_gguf(path):
            raise InputError(f"{model} is {_GGUF_ADVICE}")
        raise InputError(f"{model} is a file; give the checkpoint's directory")
    if not is_hub_id(model):
        raise InputError(f"no checkpoint at {model}: the directory does not exist")
    import huggingface_hub
    import huggingface_hub.errors

    def fetch(names: list[str]) -> Path:
        patterns = [*names, CONFIG_NAME, README, ADAPTER_CONFIG, ADAPTER_WEIGHTS, *COMPANIONS, f"{TEMPLATES}/*.jinja"]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))

    try:
        if not weights:
            return fetch([])
        for single, index in ((SINGLE_NAME, INDEX_NAME), (BIN_SINGLE_NAME, BIN_INDEX_NAME)):
            directory = fetch([single, index])
            if (directory / single).is_file():
                return directory
            if (directory / index).is_file():
                return fetch([index, *shard_names(directory / index)])
        return directory
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"no directory {model}, and the hub did not give it: {reason}") from None
    except Exception as error:  # network libraries raise their own types, which huggingface_hub does not wrap
        raise InputError(f"no directory {model}, and the hub could not be reached: {type(error).__name__}") from None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, owner and model."""
    return _HUB_ID.fullmatch(name) is not None


def adapter_base(directory: Path, adapter: Adapter) -> Path:
    """Returns the directory of an adapter's base model: from there, from here, or of the hub.

    Raises:
        InputError: The adapter names none, or there is none.
    """
    base = adapter.base
    if base is None:
        raise InputError(f"{directory}: {ADAPTER_CONFIG} names no base_model_name_or_path")
    near = Path(directory) / base
    try:
        where = near if near.is_dir() else resolve(base)
    except InputError as error:
        raise InputError(f"{directory} is an adapter of {base}: {error}") from None
    if is_adapter(where):
        raise InputError(f"{directory} is an adapter of {base}, which is an adapter itself; fold that one first")
    return where


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    directory = Path(directory)
    if not (directory / ADAPTER_CONFIG).is_file() or (directory / CONFIG_NAME).is_file():
        return False
    return not any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME, BIN_SINGLE_NAME, BIN_INDEX_NAME))


def is_gguf(file: Path) -> bool:
    """Whether a file is a llama.cpp model."""
    if file.suffix == ".gguf":
        return True
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory; raises InputError that says what is there instead, if it is not."""
    directory = Path(directory)
    if directory.is_dir() and not (directory / CONFIG_NAME).is_file():
        raise InputError(explain(directory, f"{directory / CONFIG_NAME} does not exist"))
    return read_json(directory / CONFIG_NAME)


def write_config(config: Mapping[str, Any], directory: Path) -> None:
    """Writes `config.json` into an existing directory."""
    text = json.dumps(dict(config), indent=2, ensure_ascii=False)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def copy_companions(source: Path, destination: Path) -> None:
    """Copies tokenizer, generation config, processor and chat template files, as they are."""
    for name in [*COMPANIONS, *(f"{TEMPLATES}/{file.name}" for file in extra_templates(source))]:
        file = Path(source) / name
        if file.is_file():
            (Path(destination) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, Path(destination) / name)


def extra_templates(directory: Path) -> list[Path]:
    """Chat templates of a checkpoint beside its main one."""
    return sorted((Path(directory) / TEMPLATES).glob("*.jinja"))
