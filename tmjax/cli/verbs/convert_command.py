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
    to: Annotated[str, typer.Option(help="hf, orbax, or lora: the difference from --base as a PEFT adapter.")],
    base: Annotated[str | None, typer.Option(help="With --to lora: the model that the adapter belongs to.")] = None,
    rank: Annotated[int, typer.Option(help="With --to lora: rank of every projection's update.")] = 32,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, for example 5GB.")] = "5GB",
    output: OutputFlags,
) -> None:
    """Convert a checkpoint between Hugging Face and orbax, bit for bit unless --dtype asks otherwise, or to a LoRA."""
    from tmjax.commands.convert import convert, parse_dtype

    if to not in ("hf", "orbax", "lora"):
        raise InputError(f"--to {to!r} is not known; write hf, orbax or lora")
    if (base is not None) != (to == "lora"):
        raise InputError("--to lora needs --base, the model that the adapter belongs to; other forms have none")
    if base is not None:
        _extract(model, out, base, rank, dtype, output)
        return
    settings = {"dtype": parse_dtype(dtype), "max_shard_size": max_shard_size, "overwrite": output.overwrite}
    done = convert(model, out, to=to, **settings)
    name, size = done.family.model_type, done.parameters
    result = {"input": model, "output": str(out), "to": to, "model_type": name, "parameters": size, "dtype": dtype}

    def show(console: Any) -> None:
        console.print(f"{model} -> {out} ({to}, {name}, {size:,} parameters)")
        for note in done.notes:
            print_note(console, note)

    show_result(result | {"notes": list(done.notes)}, show, as_json=output.as_json)


def _extract(model: str, out: Path, base: str, rank: int, dtype: str | None, output: OutputFlags) -> None:
    """Writes and shows a LoRA."""
    from tmjax.commands.convert import extract_lora

    if dtype is not None:
        raise InputError("the matrices of a LoRA are float32; leave --dtype out")
    done = extract_lora(model, out, base=base, rank=rank, overwrite=output.overwrite)
    result = {"input": model, "output": str(out), "to": "lora", "base": base, "rank": rank}

    def show(console: Any) -> None:
        console.print(f"{model} -> {out} (lora of {base}, rank {rank}, {len(done.errors)} projections)")
        kinds: dict[str, list[float]] = {}
        for name, error in done.errors.items():
            kinds.setdefault(".".join(name.split(".")[-3:-1]), []).append(error)
        for kind, errors in kinds.items():
            console.print(
                f"{kind}: relative error of the change {sum(errors) / len(errors):.3f}, at most {max(errors):.3f}"
            )
        for name, size in done.left_out.items():
            print_note(console, f"{name} changed by {size:.1e} of its norm; the adapter has no part of that")

    show_result(result | {"errors": done.errors, "left_out": done.left_out}, show, as_json=output.as_json)
