"""Writes a random Hugging Face checkpoint of any supported family, shape and dtype, sharded or not.

Tensors are generated one at a time, straight into the file, and each depends only on its name and the seed: a
checkpoint of many gigabytes needs the memory of its largest tensor.

    python tools/make_checkpoint.py OUT --family qwen2 --hidden 256 --layers 6 --heads 8 --kv-heads 2 --dtype bfloat16
"""

import hashlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tmjax.checkpoints.formats.safetensors import DTYPES_BY_NAME as DTYPES
from tmjax.checkpoints.formats.writer import DEFAULT_SHARD_SIZE, TensorMeta, write_tensors
from tmjax.checkpoints.hub import CONFIG_NAME, copy_companions, read_config
from tmjax.cli import run
from tmjax.errors import InputError
from tmjax.files.atomic import atomic_directory
from tmjax.models.families import FAMILIES, family_of
from tmjax.models.spec import DecoderSpec, Rotary
from tmjax.text.tokenizer import load_tokenizer

ROTARY = {
    "default": Rotary(),
    "linear": Rotary(scaling="linear", factor=4.0),
    "llama3": Rotary(theta=500000.0, scaling="llama3", factor=8.0, high_freq_factor=4.0, original_positions=8192),
}
_CHUNK = 1 << 22  # numbers drawn at a time


def make_checkpoint(
    directory: Path,
    family: str,
    spec: DecoderSpec,
    *,
    dtype: str = "float32",
    scale: float | None = None,
    seed: int = 0,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the checkpoint atomically and returns its path.

    Args:
        directory: where; must be absent or empty unless `overwrite`.
        family: the `model_type`.
        spec: the architecture; what the family fixes must be set in it.
        dtype: float32, bfloat16 or float16.
        scale: standard deviation of the matrices, with norms 1 and biases 0. None is "sharp": matrices
            N(0, 2 / sqrt(fan_in)) and noise N(0, 0.3) on the rest, so that a test sees every part of the forward pass.
        seed: with the tensor's name, decides its values.
        max_shard_size: such as `200MB`.
        tokenizer: a checkpoint directory whose tokenizer files and token ids are taken over.
        overwrite: replace what is there.

    Raises InputError for a spec that the family cannot express or a tokenizer with more tokens than the vocabulary.
    """
    chosen = family_of({"model_type": family})
    config = chosen.config(spec) | {"dtype": dtype}
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise InputError(f"scale {scale} is not a positive number")
    rows = [row for row in chosen.params(spec) if row.tied_to is None]
    # Parameters that share a tensor give it once.
    shapes = {name: row.disk_shape(spec) for row in rows for name in row.names(spec)}
    metas = [TensorMeta(name, DTYPES[dtype], shape) for name, shape in shapes.items()]
    one = 0.0 if spec.norm_offset else 1.0
    base = {name: 0.0 if row.path.endswith(".bias") else one for row in rows for name in row.names(spec)}

    def read(name: str) -> np.ndarray:
        return random_tensor(name, shapes[name], DTYPES[dtype], base=base[name], scale=scale, seed=seed)

    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    config |= dict.fromkeys(special)  # a family's own defaults may lie beyond a small vocabulary
    with atomic_directory(Path(directory), overwrite=overwrite) as partial:
        if tokenizer is not None:
            held = read_config(tokenizer)
            config |= {key: held[key] for key in special if key in held}
            copy_companions(tokenizer, partial)
        (partial / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokens = load_tokenizer(partial).size
            if tokens > spec.vocab:
                raise InputError(f"the tokenizer of {tokenizer} has {tokens} tokens, the vocabulary only {spec.vocab}")
        write_tensors(partial, metas, read, max_shard_size=max_shard_size)
    return Path(directory)


def family_spec(family: str, *, rotary: Rotary | None = None, **sizes: int | bool) -> DecoderSpec:
    """The spec of a family with these attributes of `DecoderSpec`, as far as its config has keys for them.

    Everything else is what the family does unless told otherwise; `rotary` keeps the family's partial fraction and
    order of dimensions.
    """
    chosen = family_of({"model_type": family})
    told = {field.key: sizes[field.attribute] for field in chosen.fields if field.attribute in sizes}
    spec = chosen.spec({"model_type": family} | told)
    if rotary is None or spec.rotary.scaling == "none":
        return spec
    kept = replace(rotary, fraction=spec.rotary.fraction, interleaved=spec.rotary.interleaved)
    return replace(spec, rotary=kept)


def random_tensor(
    name: str, shape: tuple[int, ...], dtype: np.dtype, *, base: float, scale: float | None, seed: int
) -> np.ndarray:
    """The values of one tensor; `base` is the mean of a 1-D parameter."""
    matrix = len(shape) > 1
    std = (2 / math.sqrt(shape[-1]) if matrix else 0.3) if scale is None else (scale if matrix else 0.0)
    digest = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng([seed, *np.frombuffer(digest[:16], np.uint32).tolist()])
    values = np.empty(math.prod(shape), dtype)
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        part[:] = rng.standard_normal(part.size, np.float32) * np.float32(std) + np.float32(0.0 if matrix else base)
    return values.reshape(shape)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def _main(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    family: Annotated[str, typer.Option(help=f"One of {', '.join(FAMILIES)}.")] = "llama",
    hidden: Annotated[int, typer.Option(min=1, help="Size of the residual stream.")] = 64,
    layers: Annotated[int, typer.Option(min=1)] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 4,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Default: as many as query heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Default: hidden / heads.")] = None,
    mlp: Annotated[int | None, typer.Option(min=1, help="Default: 4 hidden.")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Default: the tokenizer's size, or 256.")] = None,
    tied: Annotated[bool, typer.Option("--tied/--untied", help="Whether the head is the embedding.")] = True,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    scale: Annotated[str, typer.Option(help="Standard deviation of the matrices, or sharp.")] = "sharp",
    rope_scaling: Annotated[str, typer.Option(help=f"One of {', '.join(ROTARY)}.")] = "default",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Such as 5GB or 200MiB.")] = DEFAULT_SHARD_SIZE,
    tokenizer: Annotated[Path | None, typer.Option(help="Checkpoint directory to take the tokenizer from.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a random Hugging Face checkpoint."""
    family_of({"model_type": family})
    if rope_scaling not in ROTARY:
        raise InputError(f"--rope-scaling {rope_scaling} is not one of {', '.join(ROTARY)}")
    try:
        std = None if scale == "sharp" else float(scale)
    except ValueError:
        raise InputError(f"--scale {scale} is neither a number nor sharp") from None
    if head_dim is None and hidden % heads:
        raise InputError(f"--hidden {hidden} is not divisible by --heads {heads}; give --head-dim")
    if vocab is None:
        vocab = 256 if tokenizer is None else load_tokenizer(tokenizer).size
    spec = family_spec(
        family,
        rotary=None if rope_scaling == "default" else ROTARY[rope_scaling],
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        mlp=mlp or 4 * hidden,
        max_positions=8192 if rope_scaling == "default" else 131072,
        tied_embeddings=tied,
    )
    make_checkpoint(
        directory,
        family,
        spec,
        dtype=dtype,
        scale=std,
        seed=seed,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        overwrite=overwrite,
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run(arguments, application=app, name="make_checkpoint")


if __name__ == "__main__":
    sys.exit(main())
