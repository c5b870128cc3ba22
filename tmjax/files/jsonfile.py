"""Reading a file that holds a JSON object."""

import json
from pathlib import Path
from typing import Any

from tmjax.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises InputError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value
