"""Last stages of a merge and of an adaptation: model card, report, and the record of the result's origin."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tmjax.checkpoints.parents import Parent, read_parent
from tmjax.recipes.base import Placed
from tmjax.runs.directory import RunDirectory
from tmjax.runs.provenance import MERGED, PROVENANCE, STAGE, provenance_key, write_provenance
from tmjax.sharding import hosts

REPORT = "report.html"
#: Makes the text of a model card from the recipe, the manifest and the parents.
Card = Callable[[Any, Mapping[str, Any], Mapping[str, Parent]], str]


def write_result_pages(
    run: RunDirectory,
    recipe: Placed,
    models: Mapping[str, tuple[str, str]],
    *,
    sections: set[str],
    card: Card,
    report: Callable[[Path], None],
) -> None:
    """Writes the model card, the report and `tmjax.json`, each unless it is finished.

    Args:
        run: The run directory.
        recipe: The recipe.
        models: Name in the recipe and place of every parent.
        sections: Sections of the manifest that card and report show.
        card: Makes the text of the card.
        report: Writes the report to a file.
    """
    read = {which: read_parent(*each).to_json() for which, each in models.items()} if hosts.is_first() else {}
    facts = hosts.agree(read)
    parents = {which: Parent.from_json(values) for which, values in facts.items()}

    def write_card(partial: Path) -> None:
        partial.write_text(card(recipe, run.manifest.to_json(), parents), encoding="utf-8")

    def write_record(partial: Path) -> None:
        settings = recipe.model_dump(mode="json", exclude={"out", "places"})
        write_provenance(partial, run.path, run.manifest, settings, facts)

    key = run.manifest.to_json(sections)
    card_key = [key, run.manifest.commands, facts]
    run.stage("card", card_key, f"{MERGED}/README.md", write_card, joint=False)
    run.stage("report", key, REPORT, report, joint=False)
    record_key = provenance_key(run.manifest, facts)
    run.stage(STAGE, record_key, f"{MERGED}/{PROVENANCE}", write_record, joint=False)
