"""`tmjax vocabulary`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.cli.options import OutputFlags, TextFile
from tmjax.cli.terminal import print_note, progress_display, show_result


@dataclass(frozen=True)
class TokenFlags:
    """The new vocabulary, and the rows of tokens that are new."""

    tokenizer: Annotated[str | None, typer.Option(help="The new tokenizer: directory or hub id.")] = None
    add: Annotated[int | None, typer.Option(min=1, help="Learn so many new tokens from --texts instead.")] = None
    init: Annotated[str, typer.Option(help="Rows of new tokens: mean, similar, source or pursuit.")] = "mean"
    source: Annotated[
        str | None, typer.Option(help="A model that knows the new tokens, for --init source and pursuit.")
    ] = None
    multiple: Annotated[int, typer.Option("--multiple-of", min=1, help="Rows are padded to a multiple of this.")] = 1


def vocabulary(
    target: Annotated[str, typer.Argument(help="Checkpoint whose vocabulary changes: directory or hub id.")],
    out: Annotated[Path, typer.Argument(help="Output directory.")],
    *,
    tokens: TokenFlags,
    texts: TextFile = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, for example 5GB.")] = "5GB",
    output: OutputFlags,
) -> None:
    """Give a model another tokenizer, or more tokens, learnt from texts; rows of known tokens stay bit for bit."""
    with progress_display() as (_, warn):
        from tmjax.commands.vocabulary_transplant import VocabularyRequest, new_vocabulary

        request = VocabularyRequest(
            target, tokens.tokenizer, tokens.add, texts, tokens.init, tokens.source, tokens.multiple
        )
        result = new_vocabulary(request, out, max_shard_size=max_shard_size, overwrite=output.overwrite, warn=warn)

    def show(console: Any) -> None:
        console.print(
            f"{target} -> {out} ({result['rows_before']:,} -> {result['rows']:,} rows: {result['kept']:,} kept, "
            f"{result['new']:,} new by {tokens.init})"
        )
        if "tokens_per_byte" in result:
            before, after = result["tokens_per_byte_before"], result["tokens_per_byte"]
            console.print(f"tokens per byte of {texts}: {before:.4f} -> {after:.4f}")
        for note in result["notes"]:
            print_note(console, note)

    show_result(result, show, as_json=output.as_json)
