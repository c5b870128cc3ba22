"""Keys of older recipes: refused in one line that names the present ones."""

from typing import Any

from tmjax.errors import InputError, summarise

#: Keys of older recipes, and where their settings are now.
_MOVED = {
    **dict.fromkeys(
        ("map", "roles", "mask_top_k", "norm_match", "bias", "base", "trust"), "operators: [{transport: {KEY: ...}}]"
    ),
    **dict.fromkeys(("fit", "beta", "alphas", "betas", "groups", "learning"), "coefficients.KEY"),
    **dict.fromkeys(("embeddings", "norms"), "operators: [{transport: {}}, {residual_stream: {KEY: ...}}]"),
    "transport": "operators: [{regression: {}}]",
    "ridge": "operators: [{regression: {ridge: ...}}]",
    "screen_texts": "screen_texts",
    "lexical": "operators: [..., {embeddings: {...}}]",
    "solve": "operators: [..., {predictions: {...}}]",
}


def refuse_old_keys(values: dict[str, Any]) -> None:
    """Raises InputError for the section `fusion` of older recipes, in one line that says the new keys."""
    if "fusion" not in values:
        return
    section = values["fusion"]
    keys = list(section) if isinstance(section, dict) and section else list(_MOVED)
    lines = [f"fusion.{key} is now {_MOVED.get(key, 'operators').replace('KEY', key)}" for key in keys]
    raise InputError(f"recipe: the section fusion is now a list of operators: {summarise(lines)}")
