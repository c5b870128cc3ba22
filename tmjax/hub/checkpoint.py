"""Finding a checkpoint: a local directory or a hub id; its config, tokenizer and companion files."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tmjax.errors import InputError

CONFIG_NAME = "config.json"
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
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(model: str) -> Path:
    """The local directory of `model`, a path or a hub id (downloaded through the shared cache; offline works).

    Raises InputError if it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{model} is a file; give the checkpoint's directory")
    if not _HUB_ID.fullmatch(model):
        raise InputError(f"no checkpoint at {model}: the directory does not exist")
    import huggingface_hub
    import huggingface_hub.errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, allow_patterns=["*.safetensors", "*.safetensors.index.json", CONFIG_NAME, *COMPANIONS]
            )
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"no directory {model}, and the hub did not give it: {reason}") from None
    except Exception as error:  # network libraries raise their own types, which huggingface_hub does not wrap
        raise InputError(f"no directory {model}, and the hub could not be reached: {type(error).__name__}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises InputError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory."""
    config = read_json(Path(directory) / CONFIG_NAME)
    if "quantization_config" in config:
        raise InputError(f"{directory} is quantised (quantization_config in {CONFIG_NAME}); dequantise it first")
    return config


def copy_companions(source: Path, destination: Path) -> None:
    """Copies tokenizer, generation config and chat template files, as they are."""
    for name in COMPANIONS:
        file = Path(source) / name
        if file.is_file():
            shutil.copyfile(file, Path(destination) / name)
