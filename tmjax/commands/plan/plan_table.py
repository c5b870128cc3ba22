"""Tables of a plan, for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group

from tmjax.commands.doctor.summary import seconds, size
from tmjax.report.tables import Row, rich_table


def program_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the programs."""
    rows = []
    for item in report["programs"]:
        name = item["stage"], item["program"]
        if not item["compiles"]:
            rows.append((*name, "does not compile", *[""] * 8))
            continue
        rows.append(
            (
                *name,
                "yes" if item["fits"] else "does not fit",
                size(item["whole_bytes"]),
                size(item["live_bytes"]),
                f"{sum(item['flops'].values()) / 1e12:.3g}",
                f"{item['bytes'] / 1e9:.3g}",
                f"{item['calls']:,.0f}",
                seconds(item["stage_seconds"]),
                item["bound"],
                f"{item['compile_cpu_seconds']:.0f} s",
            )
        )
    header = ("stage", "program", "fits", "peak", "of it live", "TFLOP", "GB", "calls", "time", "bound", "compiler")
    return header, rows


def collective_rows(report: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the communication: by program, kind and place."""
    rows = []
    for item in report["programs"]:
        groups: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
        for each in item.get("collectives") or ():
            groups.setdefault((each["kind"], each["in_loop"]), []).append(each)
        for (kind, in_loop), members in sorted(groups.items()):
            moved = sum(each["bytes"] * each["turns"] for each in members)
            largest = max(each["bytes"] for each in members)
            place = "in a loop" if in_loop else "once"
            rows.append((item["stage"], item["program"], kind, place, size(largest), size(moved)))
    return ("stage", "program", "collective", "runs", "largest", "per call"), rows


def plan_summary(report: Mapping[str, Any]) -> Group:
    """Makes the output of `tmjax plan`."""
    return Group(*_lines(report))


def _lines(report: Mapping[str, Any]) -> Iterator[object]:
    mesh = ", ".join(f"{axis}={count}" for axis, count in report["mesh"].items() if count > 1) or "one device"
    yield rich_table(f"Programs on {report['topology']} ({mesh}), for one device", *program_rows(report))
    header, rows = collective_rows(report)
    if rows:
        yield rich_table("Communication of one call", header, rows)
    yield ""
    for item in report["programs"]:
        name = f"{item['stage']} {item['program']}"
        if not item["compiles"]:
            yield f"Problem: {name} does not compile: {item['reason']}"
        elif not item["fits"]:
            yield f"Problem: {name} needs {size(item['whole_bytes'])} of {size(report['memory'])} less a tenth"
        elif item["collectives"] is None:
            yield f"Note: the compiler gives no text of {name}, so its communication is not counted"
        if item["advice"]:
            yield f"  It would fit with: {'; or '.join(item['advice'])}"
    work, host = report["work"], report["host"]
    origin = "assumed" if work["assumed"] else "as the texts are"
    yield (
        f"Text: {work['texts']:,} texts of {work['tokens']:,} tokens ({origin}). Time of all stages at published"
        f" figures: {seconds(report['seconds'])}, a lower bound. Figures: {report['figures']['source']}."
    )
    yield f"Host: {size(host['memory'])} of memory, {size(host['disk'])} on disk, estimated."
    yield "Everything compiles and fits." if report["fits"] else "This does not run as it is."
