"""Notebooks: faults that show without running them, and execution with a comparison of stored and new outputs.

    python -m tools.docs_check.notebook docs/tutorial.ipynb            # executes, compares the outputs
    python -m tools.docs_check.notebook docs/tutorial.ipynb --write    # executes, stores the outputs

The notebook is executed in the working directory, the root of a checkout. Stored outputs carry no paths of a machine.
"""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

from tools.docs_check.compare import text_fault

#: Absolute paths, which would name somebody's machine.
PATHS = re.compile(r"(?<![\w.:/<>])/[\w.-]+/[\w.-]+")
#: How far numbers of stored and new outputs may differ.
TOLERANCE = 0.002
#: Seconds after which a cell counts as hanging.
LIMIT = 1200


def code_cells(notebook: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Returns the cells of code with their numbers, from 1."""
    return [(n, cell) for n, cell in enumerate(notebook["cells"], 1) if cell["cell_type"] == "code"]


def text_of(cell: dict[str, Any]) -> str:
    """Returns the text that a cell printed or ended with; pictures and standard error are left out."""
    parts = []
    for output in cell.get("outputs", ()):
        if output["output_type"] == "stream" and output["name"] == "stdout":
            parts.append("".join(output["text"]))
        elif output["output_type"] == "execute_result":
            parts.append("".join(output["data"].get("text/plain", "")))
    return "\n\n".join(parts)


def without_pictures(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns outputs without the data of pictures, whose letters mean nothing."""
    data = "data"
    return [
        {**output, data: {kind: value for kind, value in output[data].items() if not kind.startswith("image/")}}
        if data in output
        else output
        for output in outputs
    ]


def notebook_faults(path: Path) -> list[str]:
    """Finds faults of a notebook without executing it: code that is not Python, missing outputs, errors, paths."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"{path.name}: not a notebook: {error}"]
    found = []
    for number, cell in code_cells(notebook):
        place = f"{path.name}, cell {number}"
        try:
            compile("".join(cell["source"]), place, "exec")
        except SyntaxError as error:
            found.append(f"{place}: line {error.lineno} is not Python: {error.msg}")
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            found.append(f"{place}: its stored output is an error")
        if PATHS.search(json.dumps(without_pictures(cell["outputs"]))):
            found.append(f"{place}: its stored output has a path of a machine")
    if not any(cell["outputs"] for _, cell in code_cells(notebook)):
        found.append(f"{path.name}: no stored outputs; run python -m tools.docs_check.notebook {path.name} --write")
    return found


def executed(path: Path) -> dict[str, Any]:
    """Executes a notebook in the working directory and returns it with its new outputs; raises if a cell fails."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": "."}})
    client.execute()
    return notebook


def clean(notebook: dict[str, Any]) -> dict[str, Any]:
    """Returns a notebook to store: no standard error, no times and versions, no paths of a machine."""
    kept = copy.deepcopy(notebook)
    kept["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    root = str(Path.cwd())
    for number, (_, cell) in enumerate(code_cells(kept), 1):
        cell["metadata"], cell["execution_count"] = {}, number
        outputs = [each for each in cell["outputs"] if each.get("name") != "stderr"]
        for output in outputs:
            output.pop("metadata", None) if output["output_type"] == "stream" else None
            if "execution_count" in output:
                output["execution_count"] = number
        cell["outputs"] = json.loads(json.dumps(outputs).replace(f"{root}/", ""))
    return kept


def differences(stored: dict[str, Any], new: dict[str, Any], name: str) -> list[str]:
    """Compares the texts that cells printed, numbers within the tolerance."""
    found = []
    for (number, old), (_, now) in zip(code_cells(stored), code_cells(new), strict=True):
        fault = text_fault(text_of(old), text_of(now), TOLERANCE)
        if fault is not None:
            found.append(f"{name}, cell {number}: {fault}")
    return found


def main(arguments: list[str]) -> int:
    """Executes the notebooks that are named; stores their outputs with `--write`, else compares them."""
    write = "--write" in arguments
    faults: list[str] = []
    for path in (Path(name) for name in arguments if name != "--write"):
        stored = json.loads(path.read_text(encoding="utf-8"))
        new = executed(path)
        if write:
            path.write_text(json.dumps(clean(new), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            faults += differences(stored, new, path.name)
    for fault in faults:
        print(f"docs-check: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
