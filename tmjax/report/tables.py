"""Tables of a run's manifest, for the terminal, the report and the model card."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

Row = tuple[str, ...]


def evaluation_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows: arm, bits per byte, 95% interval, difference to the target, hidden bytes if any."""
    evaluation = manifest["evaluation"]
    hidden = any("unknown_share" in item for item in evaluation.values())
    base = evaluation.get("target", {}).get("bits_per_byte")
    rows = []
    for arm, item in evaluation.items():
        low, high = item["ci95"]
        change = "" if base is None or arm == "target" else f"{item['bits_per_byte'] - base:+.4f}"
        unknown = (f"{item.get('unknown_share', 0.0):.2%}",) if hidden else ()
        rows.append((arm, f"{item['bits_per_byte']:.4f}", f"[{low:.4f}, {high:.4f}]", change, *unknown))
    return ("arm", "bits/byte", "95% interval", "against target", *(("unknown bytes",) if hidden else ())), rows


def task_rows(result: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows: task and metric, and every model's value with its standard error."""
    models = result["tasks"]
    keys = dict.fromkeys(
        (task, metric)
        for model in models.values()
        for task, metrics in model["results"].items()
        for metric in metrics
        if "_stderr" not in metric
    )

    def cell(metrics: Mapping[str, Any], metric: str) -> str:
        name, comma, rest = metric.partition(",")
        value, error = metrics.get(metric), metrics.get(f"{name}_stderr{comma}{rest}")
        return "" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")

    rows = [
        (task, metric, *(cell(model["results"].get(task, {}), metric) for model in models.values()))
        for task, metric in keys
    ]
    return ("task", "metric", *models), rows


def forgetting_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows: other texts, bits per byte of target and result, the change and its interval."""
    rows = []
    for name, item in manifest["forgetting"].items():
        after = next(value for key, value in item.items() if key in ("merged", "adapted"))
        low, high = item["change"]["ci95"]
        change = f"{item['change']['bits_per_byte']:+.4f}"
        rows.append((name, f"{item['target']:.4f}", f"{after:.4f}", change, f"[{low:+.4f}, {high:+.4f}]"))
    return ("texts", "before", "after", "change", "95% interval"), rows


def source_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of several sources: name, weight, the result without it, the gain due to it, a verdict."""
    result = "adapted" if "adapted" in manifest["evaluation"] else "merged"
    shares = (manifest.get("training") or {}).get(result, {}).get("source_shares") or {}
    rows = []
    for source, gain in manifest["gain_by_source"].items():
        low, high = gain["ci95"]
        verdict = "useful" if low > 0 else "harmful" if high < 0 else "no use"
        rows.append(
            (
                source,
                manifest["inputs"][source]["path"],
                *([f"{shares.get(source, 0.0):.1%}"] if shares else []),
                f"{manifest['evaluation'][result]['bits_per_byte'] + gain['bits_per_byte']:.4f}",
                f"{gain['bits_per_byte']:+z.4f}",
                f"[{low:+z.4f}, {high:+z.4f}]",
                verdict,
            )
        )
    weight = ("weight",) if shares else ()
    return ("source", "checkpoint", *weight, "bits/byte without it", "gain due to it", "95% interval", ""), rows


def source_sentences(manifest: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each of several sources to which nothing is due, or a loss."""
    lines = []
    for source, gain in (manifest.get("gain_by_source") or {}).items():
        low, high = gain["ci95"]
        name = f"{source} ({manifest['inputs'][source]['path']})"
        if high < 0:
            lines.append(f"{name} is harmful: the result is better without it; leave it out, or mix by prediction.")
        elif low <= 0:
            lines.append(f"{name} is of no use: the result without it is not distinguishable from that with it.")
    return lines


def gain_sentence(manifest: Mapping[str, Any]) -> str:
    """Returns the gain due to the source in one sentence."""
    gain = manifest.get("source_gain")
    if gain is None:
        return "No controls were run: how much of the change is due to the source is not known (--controls)."
    low, high = gain["ci95"]
    # z: values that round to zero have no sign.
    value = f"{gain['bits_per_byte']:+z.4f} [{low:+z.4f}, {high:+z.4f}] bits/byte"
    share = gain["fraction_of_gap"]
    part = "" if share is None else f", {share:z.1%} of the gap between target and source"
    against = f"against the best control ({gain['best_control'].removeprefix('control:')})"
    if low > 0 and high < 5e-5:
        return f"Nearly nothing came from the source: less than 0.0001 bits/byte{part}, {against}."
    if low > 0:
        return f"Gain due to the source: {value}{part}, {against}."
    return f"Not distinguishable from the controls: gain due to the source {value}{part}, {against}."


def update_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the per-tensor table."""
    columns = {
        "raw_transported_to_target_norm": "‖Ŵ‖/‖W‖ raw",
        "transported_to_target_norm": "‖Ŵ‖/‖W‖",
        "source_part": "source part",
        "solved": "solved",
        "effective_update": "update",
        "cosine": "cosine",
        "alpha": "alpha",
        "beta": "beta",
        "dropped_mean": "dropped mean",
    }
    present = dict.fromkeys(key for item in manifest["update"].values() for key in item)
    columns = {key: title for key, title in columns.items() if key in present} | {
        key: key for key in present if key not in columns and key != "source_solved"
    }
    # Means of coefficients need no more digits than the coefficients that were tried.
    digits = {key: ".2g" if key in ("alpha", "beta") else ".3g" for key in columns}
    rows = [(name, *(format(item[key], digits[key]) for key in columns)) for name, item in manifest["update"].items()]
    return ("tensor", *columns.values()), rows


def alignment_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the convergence certificates."""
    rows = [
        (
            site,
            f"{item['converged']}/{item['problems']}"
            + (f" of {item['pairs']}" if item["pairs"] > item["problems"] else ""),
            "" if item["max_marginal_error"] is None else f"{item['max_marginal_error']:.1e}",
            str(item["max_iterations"]),
            str(item["log_domain"] or ""),
            item["stored"],
        )
        for site, item in manifest["alignment"].items()
    ]
    return ("site", "converged", "largest marginal error", "most iterations", "in log domain", "kept as"), rows


def concentration_rows(concentration: Mapping[str, Mapping[str, float]]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the sharpness of plans (`matching.concentration`)."""
    keys = list(dict.fromkeys(key for item in concentration.values() for key in item if key.startswith("top_")))
    rows = [
        (
            site,
            f"{item['target_units']:.0f} x {item['source_units']:.0f}",
            *(f"{item[key]:.1%}" for key in keys),
            f"{item['partners']:.1f}",
        )
        for site, item in concentration.items()
    ]
    tops = (f"mass in top {key.removeprefix('top_')}" for key in keys)
    return ("site", "units", *tops, "effective partners"), rows


def lora_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows: tensors that changed, and how much of their change the LoRA does not have."""
    facts = manifest["lora"]
    rows = [(name, f"{error:.3g}") for name, error in facts["errors"].items()]
    rows += [(name, f"no part (changed by {size:.1e} of its norm)") for name, size in facts["left_out"].items()]
    return ("tensor", f"relative error of the change at rank {facts['rank']}"), rows


def lora_sentence(manifest: Mapping[str, Any]) -> str:
    """Returns the errors of the LoRA in one sentence."""
    facts = manifest["lora"]
    errors = list(facts["errors"].values())
    left_out = f"; {len(facts['left_out'])} other tensors changed too and have no part in it" * bool(facts["left_out"])
    return (
        f"The change as a LoRA of rank {facts['rank']} (lora/): relative error per projection "
        f"{sum(errors) / len(errors):.3f} in the mean, at most {max(errors):.3f}{left_out}."
    )


def stage_rows(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Makes header and rows of the stages' times."""
    rows = [
        (name, f"{item['seconds']:.1f}", f"{item['peak_rss_mib']:.0f}", "yes" if item["reused"] else "no")
        for name, item in manifest["stages"].items()
    ]
    return ("stage", "seconds", "peak MiB", "reused"), rows


def rich_table(title: str, header: Row, rows: list[Row]) -> Table:
    """Makes a terminal table: first column left, numbers right."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Row, rows: list[Row]) -> str:
    """Makes a Markdown table."""
    lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kind_of(name: str) -> str:
    """Returns the kind of a tensor: its module and projection, without the layer."""
    return ".".join([part for part in name.split(".") if not part.isdecimal()][-3:-1])


def update_summary(manifest: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Averages the per-tensor table over layers, one row per kind of tensor."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, item in manifest["update"].items():
        groups.setdefault(kind_of(name), []).append(item)
    means = {
        kind: {key: sum(item[key] for item in items) / len(items) for key in items[0]} for kind, items in groups.items()
    }
    return update_rows({"update": means})


def scored_parts(manifest: Mapping[str, Any]) -> list[object]:
    """Makes the first parts of a summary: scores of test texts with the gain, of other texts, errors of a LoRA."""
    parts: list[object] = []
    if manifest["evaluation"]:
        parts += [
            rich_table("Bits per byte on the test texts", *evaluation_rows(manifest)),
            gain_sentence(manifest),
            "",
        ]
    if manifest.get("gain_by_source"):
        parts += [rich_table("Sources", *source_rows(manifest)), *source_sentences(manifest), ""]
    if manifest.get("forgetting"):
        parts += [rich_table("Bits per byte on other texts", *forgetting_rows(manifest))]
    if manifest.get("lora"):
        parts += [lora_sentence(manifest), ""]
    return parts


def run_summary(manifest: Mapping[str, Any]) -> Group:
    """Makes the output of `tmjax merge` at its end."""
    parts = scored_parts(manifest)
    if manifest["update"]:
        parts += [rich_table("What the merge did (mean over layers)", *update_summary(manifest))]
    parts += [rich_table("Alignment", *alignment_rows(manifest)), rich_table("Stages", *stage_rows(manifest))]
    return Group(*parts)
