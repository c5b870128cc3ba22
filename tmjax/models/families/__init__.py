"""Registry of families by Hugging Face `model_type`."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.base import Family
from tmjax.models.families.unsupported import reason

_MODULES = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
#: Every module of this folder that has a `FAMILY`.
FAMILIES: Mapping[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in _MODULES if hasattr(module, "FAMILY")
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config; raises InputError that names what its architecture has and lists those supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"model_type {model_type!r} is not supported{reason(config, frozenset(FAMILIES))};"
            f" supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
