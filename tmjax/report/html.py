"""`report.html`: one self-contained page that needs no network."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tmjax.align.alignment import Alignment
from tmjax.recipes.base import dump_recipe
from tmjax.recipes.merge import Recipe
from tmjax.report.heat_maps import plot_arms, plot_coefficient_maps, plot_heads
from tmjax.report.matching import concentration, head_shares
from tmjax.report.plots import plot_coefficients, plot_layer_plans
from tmjax.report.tables import (
    Row,
    alignment_rows,
    concentration_rows,
    evaluation_rows,
    forgetting_rows,
    gain_sentence,
    lora_rows,
    source_rows,
    source_sentences,
    stage_rows,
    update_rows,
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } th, td { padding: .2rem .7rem; border-bottom: 1px solid
#ddd } td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left
} pre { background: #f6f6f6; padding: 1rem; overflow-x: auto } img { max-width: 100% } .gain { font-size: 1.1rem;
font-weight: 600 } #samples td { text-align: left }
"""


def table(name: str, header: Row, rows: list[Row]) -> str:
    """Makes an HTML table with an id."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def image(name: str, png: bytes) -> str:
    """Makes the element of a PNG inside the page, with an id."""
    return f'<img id="{name}" alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def page(title: str, sections: list[str]) -> str:
    """Makes a whole page of sections of HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )


def quotations(samples: Sequence[Mapping[str, str]]) -> str:
    """Makes a table of generated texts, one row per beginning and model."""
    rows = [
        f"<tr><td>{escape(name)}</td><td><b>{escape(entry['prompt'])}</b>{escape(text)}</td></tr>"
        for entry in samples
        for name, text in entry.items()
        if name != "prompt"
    ]
    return f'<table id="samples"><tbody>{"".join(rows)}</tbody></table>'


def source_section(manifest: Mapping[str, Any]) -> list[str]:
    """Makes the section on several sources."""
    lines = [f"<p>{escape(line)}</p>" for line in source_sentences(manifest)]
    return ["<h2>Sources</h2>", table("sources", *source_rows(manifest)), *lines]


def write_report(
    file: Path,
    run: Path,
    recipe: Recipe,
    manifest: Mapping[str, Any],
    alignment: Alignment | None,
    samples: Sequence[Mapping[str, str]] = (),
) -> None:
    """Writes the page to `file` and the plots beside it into `run`/plots.

    An entry of `samples` has a `prompt` and its continuation by the name of each model. `alignment` is None where no
    operator needed one.
    """
    plots = {}
    if alignment is not None:
        plots["layer_plan"] = plot_layer_plans(alignment)
    if "coefficients" in manifest:
        plots["coefficients"] = plot_coefficients(manifest)
        plots["coefficient_maps"] = plot_coefficient_maps(manifest)
    if alignment is not None and "attention" in manifest:
        shares = head_shares(alignment, manifest["attention"]["target"], manifest["attention"]["source"])
        if shares:
            plots["heads"] = plot_heads(shares)
    if manifest["evaluation"]:
        plots["arms"] = plot_arms(manifest)
    (run / "plots").mkdir(exist_ok=True)
    for name, png in plots.items():
        (run / "plots" / f"{name}.png").write_bytes(png)

    def shown(name: str, title: str) -> list[str]:
        return [f"<h2>{title}</h2>", image(name, plots[name])] if name in plots else []

    sections = []
    if manifest["evaluation"]:
        sections += [
            "<h2>Bits per byte on the test texts</h2>",
            f'<p class="gain" id="gain">{escape(gain_sentence(manifest))}</p>',
            table("evaluation", *evaluation_rows(manifest)),
            image("arms", plots["arms"]),
        ]
    if manifest.get("gain_by_source"):
        sections += source_section(manifest)
    if manifest.get("forgetting"):
        sections += ["<h2>Bits per byte on other texts</h2>", table("forgetting", *forgetting_rows(manifest))]
    if alignment is not None:
        sections += [
            *shown("layer_plan", "Layers"),
            "<h2>How sharp the plans are</h2>",
            "<p>Of the heaviest source layer of every target layer: the mean share of the mass of a target unit that "
            "lies on its largest partners, and the exponential of its mean entropy.</p>",
            table("concentration", *concentration_rows(concentration(alignment))),
            *shown("heads", "Heads: where the mass of each target head lies"),
        ]
    sections += shown("coefficients", "Coefficients")
    if "coefficient_maps" in plots:
        sections.append(image("coefficient_maps", plots["coefficient_maps"]))
    sections += ["<h2>Every tensor</h2>", table("update", *update_rows(manifest))]
    if manifest.get("lora"):
        sections += ["<h2>The change as a LoRA</h2>", table("lora", *lora_rows(manifest))]
    if alignment is not None:
        sections += ["<h2>Alignment certificates</h2>", table("alignment", *alignment_rows(manifest))]
    if samples:
        sections += [
            "<h2>What they write</h2>",
            "<p>After the beginnings of test texts (bold):</p>",
            quotations(samples),
        ]
    sections += [
        "<h2>Stages</h2>",
        table("stages", *stage_rows(manifest)),
        f"<h2>Recipe</h2><pre>{escape(dump_recipe(recipe, places=False))}</pre>",
    ]
    sources = [recipe.source, *(entry.source for entry in recipe.further_sources.values())]
    title = f"{' and '.join(Path(name).name for name in sources)} into {Path(recipe.target).name}"
    file.write_text(page(title, sections), encoding="utf-8")
