"""The model card of a merged checkpoint."""

from collections.abc import Mapping
from typing import Any

from tmjax.recipes.merge import Recipe
from tmjax.recipes.sources import SOURCE
from tmjax.report.card_parts import Parents, licence_section, metadata_block, origin_section
from tmjax.report.tables import (
    evaluation_rows,
    gain_sentence,
    lora_sentence,
    markdown_table,
    source_rows,
    source_sentences,
    update_rows,
)


def model_card(recipe: Recipe, manifest: Mapping[str, Any], parents: Parents) -> str:
    """Makes the card as Markdown, with the metadata block that the Hugging Face hub reads."""
    parts = [
        metadata_block(parents),
        "# Merged by optimal transport",
        f"Weights of `{recipe.source}` (source) were transported into `{recipe.target}` (target), whose "
        f"architecture and tokenizer this model keeps, with tmjax {manifest['tmjax']}, preset `{recipe.preset}`, "
        f"seed {recipe.seed}, calibrated on `{recipe.texts}`.",
    ]
    facts = manifest.get("operators") or {}
    if (facts.get("embeddings") or {}).get("chosen"):
        parts.append(
            "The source's embeddings were mapped to its own by ridge regression over tokens of the same text, and "
            "blended in: {alpha:g} of the way at most, half as far for a token that occurs {kappa:g} times in these "
            "texts.".format(**facts["embeddings"]["chosen"])
        )
    if facts.get("predictions"):
        options = next(entry["predictions"] for entry in recipe.operators if "predictions" in entry)
        sources, texts = [SOURCE, *recipe.further_sources], manifest.get("generated") or {}
        generated = sum(texts[name]["kept"] for name in sources if name in texts)
        whose, who = ("sources' mixed", "they") if recipe.sources else ("source's", "it")
        parts.append(
            f"Its read-out{' and the projections that write its residual stream' * (options['scope'] == 'direct')} "
            "were then solved for, by ridge regression toward the true next tokens of the calibration texts and the "
            f"{whose} probabilities on these and {generated} texts that {who} generated "
            f"({len(facts['predictions']['rounds'])} rounds)."
        )
    others = [name for name in facts if name not in ("embeddings", "predictions")]
    parts += [f"The operator `{name}` was applied." for name in others]
    if manifest["evaluation"]:
        parts += [
            "## Held-out text",
            f"Bits per byte on `{recipe.test}`:",
            markdown_table(*evaluation_rows(manifest)),
            gain_sentence(manifest),
        ]
    if manifest.get("gain_by_source"):
        parts += ["## Sources", markdown_table(*source_rows(manifest)), *source_sentences(manifest)]
    parts += [
        "## What the merge did to every tensor",
        markdown_table(*update_rows(manifest)),
        *([lora_sentence(manifest)] if manifest.get("lora") else []),
        *licence_section(parents),
        *origin_section(recipe, manifest, "merge"),
    ]
    return "\n\n".join(parts) + "\n"
