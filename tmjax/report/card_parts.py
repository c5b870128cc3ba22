"""Parts of model cards: metadata that the Hugging Face hub reads, licences of the parents, recipe and commands."""

from collections.abc import Mapping
from typing import Any

import yaml

from tmjax.checkpoints.parents import Parent
from tmjax.recipes.base import Placed

Parents = Mapping[str, Parent]


def metadata_block(parents: Parents) -> str:
    """Makes the metadata: base models, relation, languages, tags, and the licence where the parents' licences allow it.

    Args:
        parents: The parents by name; a result of one parent alone is fine-tuned, not merged.
    """
    merged = len(parents) > 1
    bases = list(dict.fromkeys(each.hub_id for each in parents.values() if each.hub_id is not None))
    values: dict[str, Any] = {"base_model": bases} if bases else {}
    values |= {"base_model_relation": "merge" if merged else "finetune", "library_name": "transformers"}
    values["tags"] = ["merge", "tmjax"] if merged else ["tmjax"]
    languages = list(dict.fromkeys(language for each in parents.values() for language in each.languages))
    if languages:
        values["language"] = languages
    return f"---\n{yaml.safe_dump(values | _licence(parents), sort_keys=False, allow_unicode=True)}---"


def adapter_card(card: str, parents: Parents, lora: Mapping[str, Any]) -> str:
    """Makes the model card of the LoRA of a result.

    Args:
        card: The card of the result itself.
        parents: The parents by name.
        lora: Facts of the LoRA in the manifest: `rank`, `errors`, `left_out`.
    """
    values: dict[str, Any] = yaml.safe_load(metadata_block(parents).strip("-"))
    base = parents["target"].hub_id
    values.pop("base_model", None)
    values |= {"base_model_relation": "adapter", "library_name": "peft", "tags": [*values["tags"], "lora"]}
    values |= {} if base is None else {"base_model": base}
    errors = list(lora["errors"].values())
    left_out = f" {len(lora['left_out'])} tensors changed too and have no part in it." if lora["left_out"] else ""
    text = (
        f"# LoRA\n\nA PEFT adapter of rank {lora['rank']}: the change of the target that is described below, with a "
        f"relative error per projection of {sum(errors) / len(errors):.3f} in the mean, {max(errors):.3f} at most."
        f"{left_out} Scores below are of the result itself, not of the adapter."
    )
    _, _, body = card.partition("\n---") if card.startswith("---") else ("", "", card)
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n\n{text}\n\n{body.strip()}\n"


def _licence(parents: Parents) -> dict[str, str]:
    """The keys of the licence: none where one is missing, the names of both where they differ."""
    terms = [each.terms for each in parents.values()]
    if None in terms:
        return {}
    first = next(iter(parents.values()))
    if len(set(terms)) > 1:
        return {"license": "other", "license_name": "-and-".join(dict.fromkeys(map(str, terms)))}
    further = {"license_name": first.licence_name, "license_link": first.licence_link}
    return {"license": str(first.licence)} | {key: value for key, value in further.items() if value is not None}


def licence_warning(parents: Parents) -> str | None:
    """Returns a line about licences of the parents that are missing or that differ; None where they agree."""
    missing = [f"{name} {each.name}" for name, each in parents.items() if each.terms is None]
    if missing:
        return (
            f"the licence of {' and '.join(missing)} is not known: neither its README.md nor its config.json names "
            "one; find it out before others get the result"
        )
    terms = {name: each.terms for name, each in parents.items()}
    if len(set(terms.values())) > 1:
        named = ", ".join(f"{name} {parents[name].name}: {licence}" for name, licence in terms.items())
        every = "both" if len(terms) == 2 else "all"
        return f"the licences of the parents differ ({named}); the result must keep to {every}"
    return None


def licence_section(parents: Parents) -> list[str]:
    """Makes the paragraphs on licences."""
    lines = [f"* {name} `{each.name}`: {each.terms or 'not known'}" for name, each in parents.items()]
    warning = licence_warning(parents)
    return ["## Licences", "\n".join(lines), *([f"Warning: {warning}."] if warning else [])]


def origin_section(recipe: Placed, manifest: Mapping[str, Any], command: str) -> list[str]:
    """Makes the paragraphs on the recipe and the commands.

    Args:
        recipe: The recipe; the author's directories, which are private, are left out.
        manifest: The manifest of the run.
        command: The name of the command that runs such a recipe.
    """
    settings = recipe.model_dump(mode="json", exclude={"out", "places"})
    given = manifest.get("commands")
    return [
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```",
        "## Command",
        "It was made by:" if given else "With the recipe above in a file, it is made by:",
        "\n".join(["```sh", *(given or [f"tmjax {command} recipe.yaml --out RUN"]), "```"]),
    ]
