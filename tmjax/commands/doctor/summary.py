"""Tables of the doctor's report, for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group

from tmjax.report.tables import Row, rich_table


def size(count: float) -> str:
    """Writes a number of bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def seconds(value: float) -> str:
    """Writes a duration with a unit and the few digits that an estimate deserves."""
    if value < 1:
        return "< 1 s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "not said" if value is None else str(value)


def model_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the models."""
    models = report["models"]
    keys = list(next(model for model in models.values() if model))
    rows = []
    for key in keys:
        values = ["unknown" if model is None else model[key] for model in models.values()]
        shown = [size(v) if key == "bytes" and isinstance(v, int) else _shown(v) for v in values]
        rows.append((key.replace("_", " "), *shown))
    return ("", *models), rows


def operator_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the operators, in order."""
    rows = [
        (item["name"], ", ".join(item["needs"]) or "nothing", "yes" if item["chooses"] else "no")
        for item in report["operators"]
    ]
    return ("operator", "needs of the source", "chooses on validation texts"), rows


def projection_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the projections, transported or not."""
    listed = report["projections"]
    rows = [(p["role"], "yes", str(p["target_shape"]), str(p["source_shape"]), "") for p in listed["mapped"]]
    rows += [(p["role"], "no", "", "", p["reason"]) for p in listed["left_out"]]
    return ("projection", "transported", "target [out, in]", "source [out, in]", ""), rows


def difference_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the differences in architecture."""
    rows = [(d["what"], d["target"], d["source"], "" if d["same"] else "differs") for d in report["differences"]]
    return ("", "target", "source", ""), rows


def tokenizer_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the overlap of two vocabularies."""
    overlap = report["tokenizers"]
    both = ("target", "source")
    special = [", ".join(f"{token} = {number}" for token, number in overlap["special"][name].items()) for name in both]
    rows = [
        ("tokens", *(f"{overlap[name]:,}" for name in both)),
        ("shared strings", *(f"{overlap['shared']:,} ({overlap[f'share_of_{name}']:.1%})" for name in both)),
        ("special tokens", *special),
    ]
    return ("", *both), rows


def memory_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the memory of every stage."""
    memory = report["memory"]
    rows = [(name, size(value)) for name, value in memory["stages"].items()]
    rows += [("solver, of these", size(memory["solver"])), ("peak", size(memory["peak"]))]
    rows += [("this machine", size(memory["available"]))] if memory["available"] else []
    return ("stage", "memory"), rows


def site_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the storage of every site's plans."""
    rows = [
        (
            site,
            " x ".join(f"{units:,}" for units in item["units"]),
            f"{item['pairs']:,}",
            size(item["features"]),
            size(item["potentials"]),
            size(item["dense"]),
            item["kept_as"],
        )
        for site, item in report["memory"]["sites"].items()
    ]
    return ("site", "units", "pairs of layers", "features", "potentials", "dense plans", "kept as"), rows


def time_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the estimated times, one row per device."""
    devices = report["time"]["devices"]
    stages = list(next(iter(devices.values()))["stages"])
    rows = [
        (name, *(seconds(item["stages"][stage]) for stage in stages), seconds(item["total"]))
        for name, item in devices.items()
    ]
    return ("device", *stages, "in all"), rows


def doctor_summary(report: Mapping[str, Any]) -> Group:
    """Makes the output of `tmjax doctor`."""
    return Group(*_parts(report))


def _parts(report: Mapping[str, Any]) -> Iterator[object]:
    if any(report["models"].values()):
        yield rich_table("Models", *model_rows(report))
    if report["operators"]:
        yield rich_table("Operators", *operator_rows(report))
    if report["projections"]:
        yield rich_table("Projections", *projection_rows(report))
    if report["differences"]:
        yield rich_table("How they compute", *difference_rows(report))
    if report["tokenizers"]:
        yield rich_table("Tokenizers", *tokenizer_rows(report))
    if report["memory"]:
        yield rich_table("Memory, estimated", *memory_rows(report))
        if report["memory"]["sites"]:
            yield rich_table("Plans by site, estimated", *site_rows(report))
    if report["time"]:
        yield rich_table("Time: a rough estimate, not a measurement", *time_rows(report))
        yield f"Assumed: {report['time']['assumption']}."
        yield "What compilers for TPUs and GPUs make of it: tmjax plan --topology NAME, with the same models."
    yield ""
    for kind, name in (("notes", "Note"), ("problems", "Problem")):
        for line in report[kind]:
            yield f"{name}: {line}"
    yield "These two can be merged." if report["mergeable"] else "These two cannot be merged."
