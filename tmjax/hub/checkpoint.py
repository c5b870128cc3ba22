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


_SAFETENSORS = ["*.safetensors", "*.safetensors.index.json"]
_TORCH = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_GGUF_ADVICE = "a GGUF file, whose weights are packed; give the Hugging Face checkpoint that it was made from"


def resolve(model: str, *, weights: bool = True) -> Path:
    """The local directory of `model`, a path or a hub id (downloaded through the shared cache; offline works).

    Of the hub, safetensors are fetched, PyTorch's files only where there are none; `weights` false fetches neither.
    Raises InputError if it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if is_gguf(path):
            raise InputError(f"{model} is {_GGUF_ADVICE}")
        raise InputError(f"{model} is a file; give the checkpoint's directory")
    if not _HUB_ID.fullmatch(model):
        raise InputError(f"no checkpoint at {model}: the directory does not exist")
    import huggingface_hub
    import huggingface_hub.errors

    def fetch(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                model, allow_patterns=[*patterns, CONFIG_NAME, *COMPANIONS, f"{TEMPLATES}/*.jinja"]
            )
        )

    try:
        found = fetch(_SAFETENSORS if weights else [])
        if weights and not any(found.glob("*.safetensors")):
            found = fetch(_TORCH)
        return found
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"no directory {model}, and the hub did not give it: {reason}") from None
    except Exception as error:  # network libraries raise their own types, which huggingface_hub does not wrap
        raise InputError(f"no directory {model}, and the hub could not be reached: {type(error).__name__}") from None


def is_gguf(file: Path) -> bool:
    """Whether a file is a llama.cpp model."""
    if file.suffix == ".gguf":
        return True
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


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
    """The `config.json` of a checkpoint directory; raises InputError for quantised checkpoints and GGUF files."""
    packed = sorted(Path(directory).glob("*.gguf"))
    if packed and not (Path(directory) / CONFIG_NAME).is_file():
        raise InputError(f"{packed[0]} is {_GGUF_ADVICE}")
    config = read_json(Path(directory) / CONFIG_NAME)
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            told = f"{key}, {method}" if isinstance(method, str) else key
            raise InputError(
                f"{directory} is quantised ({told} in {CONFIG_NAME}); dequantise it first or give the checkpoint that"
                " it was made from"
            )
    return config


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
