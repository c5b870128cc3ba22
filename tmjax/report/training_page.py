"""Report of an adaptation: training curves, the table of its arms, one self-contained page, the model card."""

import csv
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Group

from tmjax.recipes.adapt import AdaptRecipe
from tmjax.recipes.base import dump_recipe
from tmjax.recipes.sources import SOURCE
from tmjax.report.card_parts import Parents, licence_section, metadata_block, origin_section
from tmjax.report.html import image, page, source_section, table
from tmjax.report.plots import new_figure, png_bytes
from tmjax.report.tables import (
    Row,
    evaluation_rows,
    forgetting_rows,
    gain_sentence,
    lora_rows,
    lora_sentence,
    markdown_table,
    rich_table,
    scored_parts,
    source_rows,
    source_sentences,
    stage_rows,
)


def _further(item: Mapping[str, Any]) -> list[str]:
    """Returns the names of an arm's terms, beside the next tokens of the given texts."""
    return [f"texts by {item['texts_by']}" if term == "generated" else term for term in item["terms"]]


def training_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows: arm, trained parameters, learning rate, steps, best step, validation bits per byte."""
    rows = []
    for arm, item in manifest["training"].items():
        valid = item["valid_bits_per_byte"]
        rows.append(
            (
                arm,
                " + ".join([f"{item['mode']} from {item['init']}", *_further(item)]),
                f"{item['lr']:g}",
                f"{item['steps']}" + (" (stopped early)" if item["stopped_early"] else ""),
                str(item["best_step"]),
                "" if valid is None else f"{valid:.4f}",
            )
        )
    return ("arm", "trained", "learning rate", "steps", "best step", "validation bits/byte"), rows


def adapt_summary(manifest: Mapping[str, Any]) -> Group:
    """Makes the output of `tmjax adapt` at its end."""
    parts = scored_parts(manifest)
    parts += [rich_table("Training", *training_rows(manifest)), rich_table("Stages", *stage_rows(manifest))]
    return Group(*parts)


def read_log(file: Path) -> dict[str, list[float]]:
    """Reads the columns of a `log.csv`; empty cells are NaN."""
    with file.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    return {name: [float(row[i] or "nan") for row in rows] for i, name in enumerate(header)}


def plot_training(run: Path, manifest: Mapping[str, Any]) -> bytes:
    """Plots losses, validation bits per byte and throughput over the steps of each arm's best schedule."""
    figure, axes = new_figure(2, 2, 4.6, 3.2)
    panels = {"text": "loss, nats per token", "valid": "validation, bits per byte", "guide": "guidance, squared error"}
    for arm, item in manifest["training"].items():
        log = read_log(run / "training" / arm / item["folder"] / "log.csv")
        for axis, (key, title) in zip(axes.flat, panels.items(), strict=False):
            values = log[key]
            if key == "valid":
                steps, values = zip(*item["valid_history"], strict=True) if item["valid_history"] else ((), ())
            else:
                steps = log["step"]
            if key != "guide" or any(values):
                axis.plot(steps, values, label=arm, linewidth=1, marker="o" if key == "valid" else None, markersize=3)
            axis.set_title(title)
            axis.set_xlabel("step")
        pace = [tokens / max(seconds, 1e-9) for tokens, seconds in zip(log["tokens"], log["seconds"], strict=True)]
        axes[1, 1].plot(log["step"], pace, label=arm, linewidth=1)
        axes[1, 1].set_title("tokens per second, since the start")
        axes[1, 1].set_xlabel("step")
    axes[0, 0].legend(fontsize="small")
    return png_bytes(figure)


def write_training_report(file: Path, run: Path, recipe: AdaptRecipe, manifest: Mapping[str, Any]) -> None:
    """Writes the page to `file` and `plots/training.png` into the run directory."""
    png = plot_training(run, manifest)
    (run / "plots").mkdir(exist_ok=True)
    (run / "plots/training.png").write_bytes(png)
    sections = []
    if manifest["evaluation"]:
        sections += [
            "<h2>Bits per byte on the test texts</h2>",
            table("evaluation", *evaluation_rows(manifest)),
            f'<p class="gain" id="gain">{escape(gain_sentence(manifest))}</p>',
        ]
    if manifest.get("gain_by_source"):
        sections += source_section(manifest)
    if manifest.get("forgetting"):
        sections += ["<h2>Bits per byte on other texts</h2>", table("forgetting", *forgetting_rows(manifest))]
    if manifest.get("lora"):
        sections += ["<h2>The change as a LoRA</h2>", table("lora", *lora_rows(manifest))]
    sections += [
        "<h2>Training</h2>",
        table("training", *training_rows(manifest)),
        image("training_plot", png),
        "<h2>Stages</h2>",
        table("stages", *stage_rows(manifest)),
        f"<h2>Recipe</h2><pre>{escape(dump_recipe(recipe, places=False))}</pre>",
    ]
    file.write_text(page(f"Adaptation of {Path(recipe.target).name}", sections), encoding="utf-8")


def adapted_card(recipe: AdaptRecipe, manifest: Mapping[str, Any], parents: Parents) -> str:
    """Makes the model card of an adapted checkpoint, with the metadata block that the Hugging Face hub reads."""
    given = manifest["inputs"]
    sources = [f"`{item['path']}`" for name, item in given.items() if name.split("-")[0] == SOURCE]
    source = f" and the source{'s' * (len(sources) > 1)} {' and '.join(sources)}" if sources else ""
    parts = [
        metadata_block(parents),
        "# Adapted",
        f"`{given['target']['path']}` (target) was trained on `{recipe.texts}`{source}, mode `{recipe.mode}`, seed "
        f"{recipe.seed}, with tmjax {manifest['tmjax']}. Architecture and tokenizer are the target's.",
    ]
    if manifest["evaluation"]:
        parts += [f"## Held-out text\n\nBits per byte on `{recipe.test}`:", markdown_table(*evaluation_rows(manifest))]
        parts.append(gain_sentence(manifest))
    if manifest.get("gain_by_source"):
        parts += ["## Sources", markdown_table(*source_rows(manifest)), *source_sentences(manifest)]
    if manifest.get("forgetting"):
        parts += ["## Other texts", markdown_table(*forgetting_rows(manifest))]
    parts += ["## Training", markdown_table(*training_rows(manifest))]
    if manifest.get("lora"):
        parts.append(lora_sentence(manifest))
    parts += [*licence_section(parents), *origin_section(recipe, manifest, "adapt")]
    return "\n\n".join(parts) + "\n"
