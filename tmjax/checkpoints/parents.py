"""Facts of a parent of a published model: its id on the hub, its licence and its languages.

They are read from the metadata of its own README.md, a licence from config.json where the former names none. Nothing is
guessed: what a checkpoint does not say is not known.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tmjax.checkpoints.hub import CONFIG_NAME, README, is_hub_id, resolve
from tmjax.errors import InputError
from tmjax.files.jsonfile import read_json

_METADATA = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
#: Folder of a model in the hub's cache.
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")


@dataclass(frozen=True)
class Parent:
    """One of the models that a result was made from.

    Attributes:
        name: Its name in the recipe.
        hub_id: Its id on the hub; None for a local checkpoint.
        licence: Identifier of its licence; None where it names none.
        licence_name: Name of a licence whose identifier is `other`.
        licence_link: Address of that licence.
        languages: Languages that it names.
    """

    name: str
    hub_id: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()

    @property
    def terms(self) -> str | None:
        """The licence as a reader needs it."""
        return self.licence_name if self.licence == "other" and self.licence_name else self.licence

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as a JSON object."""
        return asdict(self) | {"languages": list(self.languages)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Parent":
        """Returns the parent of an object that `to_json` made."""
        return cls(**{**values, "languages": tuple(values["languages"])})


def read_parent(name: str, place: str) -> Parent:
    """Reads the facts of a checkpoint.

    Args:
        name: Its name in a recipe.
        place: Its directory or hub id.

    Returns:
        The facts; those that cannot be read are not known.
    """
    try:
        directory = resolve(place, weights=False)
    except InputError:  # it was moved or deleted after its weights were read
        return Parent(name, name if is_hub_id(name) else None)
    values = card_metadata(directory / README)
    licence = _text(values.get("license"))
    if licence is None and (directory / CONFIG_NAME).is_file():
        licence = _text(read_json(directory / CONFIG_NAME).get("license"))
    return Parent(
        name,
        _hub_id(place, directory),
        licence,
        _text(values.get("license_name")),
        _text(values.get("license_link")),
        tuple(_texts(values.get("language"))),
    )


def card_metadata(file: Path) -> dict[str, Any]:
    """Returns the metadata of a model card; empty where there is none that can be read."""
    try:
        block = _METADATA.match(file.read_text(encoding="utf-8"))
        values = yaml.safe_load(block[1]) if block else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _hub_id(place: str, directory: Path) -> str | None:
    """The id of a checkpoint that the hub gave, by its name or as a folder of the hub's cache."""
    if not Path(place).expanduser().exists():
        return place
    cached = next((match for part in directory.absolute().parts if (match := _CACHED.fullmatch(part))), None)
    return f"{cached['owner']}/{cached['name']}" if cached else None


def _texts(value: object) -> list[str]:
    """The texts of a value that is one text or a list of them."""
    return [each.strip() for each in (value if isinstance(value, list) else [value]) if isinstance(each, str) and each]


def _text(value: object) -> str | None:
    return " and ".join(_texts(value)) or None
