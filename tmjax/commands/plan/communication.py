"""Collectives of a compiled program, and how often they run: from its text."""

import re
from dataclasses import dataclass
from typing import Any

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_CALL = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")


@dataclass(frozen=True)
class Collective:
    """Communication between devices.

    Attributes:
        kind: Name of the operation.
        bytes: Bytes of its result on a device.
        turns: Turns of the loops around it; 1 outside of loops.
        in_loop: Whether it is inside a loop.
        origin: The function that it comes from.
    """

    kind: str
    bytes: int
    turns: float
    in_loop: bool
    origin: str

    @property
    def moved(self) -> float:
        """Bytes of all turns."""
        return self.bytes * self.turns

    def facts(self) -> dict[str, Any]:
        """Returns its entry in the report."""
        return {
            "kind": self.kind,
            "bytes": self.bytes,
            "turns": self.turns,
            "in_loop": self.in_loop,
            "origin": self.origin,
        }


def _size(shape: str) -> int:
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        entries = _BYTES.get(dtype, 0)
        for dim in filter(None, dims.split(",")):
            entries *= int(dim)
        total += entries
    return total


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by name, and the name of the one that begins."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if line and line[0] not in " }" and line.rstrip().endswith("{"):
            opened = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            name = opened[2] if opened else ""
            lines[name] = []
            entry = name if opened and opened[1] else entry
        elif name and line.startswith(" "):
            lines[name].append(line)
    return lines, entry


def _turns(line: str, lines: dict[str, list[str]], unknown: int) -> float:
    """Turns of a loop: as the compiler says, else the bound that its condition compares with, else `unknown`."""
    known = re.search(r'known_trip_count"?:?\s*\{?"?n"?:"?(\d+)', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    waiting, bounds = [condition[1]] if condition else [], []
    while waiting:
        part = lines.get(waiting.pop(), [])
        bounds += [int(n) for text in part for n in re.findall(r"s32\[\][^=]*? constant\((\d+)\)", text)]
        waiting += [n for text in part for n in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text)]
    return max(bounds, default=unknown) or unknown


def collectives(program: str, unknown: int = 1) -> list[Collective]:
    """Finds the collectives of a compiled program.

    Args:
        program: Its text, `compiled.as_text()`.
        unknown: Turns of loops whose number the data decides.
    """
    lines, entry = _computations(program)
    result: list[Collective] = []
    waiting = [(entry, 1.0, False)]
    seen = set()
    while waiting:
        name, turns, in_loop = item = waiting.pop()
        if item in seen or name not in lines:
            continue
        seen.add(item)
        for line in lines[name]:
            body = re.search(r"body=%?([\w.\-]+)", line)
            if body:
                waiting.append((body[1], turns * _turns(line, lines, unknown), True))
            waiting += [
                (called, turns, in_loop)
                for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
            ]
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                waiting += [(called, turns, in_loop) for called in re.findall(r"[\w.\-]+", group)]
            call = _CALL.search(line)
            if call:
                shape, kind, started = call.groups()
                parts = re.findall(r"\w+\[[\d,]*\]", shape)
                # A started gather or permutation lists operand and result.
                text = parts[1] if started and kind in ("all-gather", "collective-permute") and parts[1:] else shape
                origin = re.search(r'op_name="([^"]*)"', line)
                result.append(Collective(kind, _size(text), turns, in_loop, origin[1] if origin else ""))
    return result
