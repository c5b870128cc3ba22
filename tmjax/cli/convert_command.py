"""`tmjax convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.cli.options import OutputFlags
from tmjax.cli.terminal import print_note, show_result
from tmjax.errors import InputError


def convert(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id or orbax directory of ours.")],
    out: Annotated[Path, typer.Argument(help="Output directory.")],
    *,
    to: Annotated[str, typer.Option(help="hf or orbax.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, for example 5GB.")] = "5GB",
    output: OutputFlags,
) -> None:
    """Convert a checkpoint between Hugging Face and orbax, bit for bit unless --dtype asks for another."""
    from tmjax.commands.convert import convert, parse_dtype

    if to not in ("hf", "orbax"):
        raise InputError(f"--to {to!r} is not known; write hf or orbax")
    settings = {"dtype": parse_dtype(dtype), "max_shard_size": max_shard_size, "overwrite": output.overwrite}
    done = convert(model, out, to=to, **settings)
    name, size = done.family.model_type, done.parameters
    result = {"input": model, "output": str(out), "to": to, "model_type": name, "parameters": size, "dtype": dtype}

    def show(console: Any) -> None:
        console.print(f"{model} -> {out} ({to}, {name}, {size:,} parameters)")
        for note in done.notes:
            print_note(console, note)

    show_result(result | {"notes": list(done.notes)}, show, as_json=output.as_json)
