"""Registry of families by Hugging Face `model_type`: one file per family, found by its `FAMILY`.

Families of other packages are found by an entry point of the group `tmjax.families` with the name of the `model_type`.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family
from tmjax.models.families.unsupported import reason
from tmjax.plugins import load_plugin, offered

#: Group of entry points under which packages offer families.
ENTRY_POINTS = "tmjax.families"
_MODULES = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
#: Every module of this folder that has a `FAMILY`.
FAMILIES: Mapping[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in _MODULES if "FAMILY" in vars(module)
}
#: Other names of families: checkpoints that came with code of their own, which transformers does not have.
ALIASES: Mapping[str, str] = {"kimi_k2": "deepseek_v3", "mimo": "qwen2"}


def family_of(config: Mapping[str, Any]) -> Family:
    """Finds the family of a config.

    Raises:
        InputError: There is none; names the parts of its architecture that are not supported, and lists the families.
    """
    model_type = config.get("model_type")
    model_type = ALIASES.get(model_type, model_type) if isinstance(model_type, str) else model_type
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    others = offered(ENTRY_POINTS)
    if isinstance(model_type, str) and model_type in others:
        family = load_plugin(model_type, ENTRY_POINTS, "family")
        if not isinstance(family, Family) or family.model_type != model_type:
            raise InputError(f"the entry point {ENTRY_POINTS} {model_type!r} is no Family of this model_type")
        return family
    supported = {*FAMILIES, *others}
    raise InputError(
        f"model_type {model_type!r} is not supported{reason(config, frozenset(supported))};"
        f" supported are {', '.join(sorted(supported))}"
    )
