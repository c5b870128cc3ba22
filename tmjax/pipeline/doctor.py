"""What can be said of a pair of models before any weight is read: what fits, what is mapped, what it will take.

Only config.json and the tokenizers' files are read, and the texts if they are given.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmjax.activations.rows import pair_rows
from tmjax.align.alignment import solver_of
from tmjax.align.streaming import require_streamable
from tmjax.convert.orbax import is_orbax
from tmjax.errors import InputError
from tmjax.hub.checkpoint import read_config, resolve
from tmjax.hub.tensors import INDEX_NAME, SINGLE_NAME
from tmjax.hub.texts import read_texts
from tmjax.hub.tokenizer import TextTokenizer, load_tokenizer
from tmjax.hub.torch_bin import BIN_INDEX_NAME, BIN_SINGLE_NAME
from tmjax.models.families import family_of
from tmjax.models.spec import FULL_ATTENTION, DecoderSpec, ParamSpec, Rotary, projections, shared_projections
from tmjax.ot import capabilities_of
from tmjax.pipeline.doctor_estimate import Reading, memory, require_room, sites_of, time
from tmjax.recipe import Recipe
from tmjax.sharding.mesh import AUTO, Layout

#: Rows and tokens that are assumed where no texts are given.
ASSUMED = Reading(rows=10_000, target_tokens=15_000, source_tokens=15_000, assumed=True)


@dataclasses.dataclass(frozen=True)
class Side:
    """One model as its config describes it; no weights."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    spec: DecoderSpec
    rows: tuple[ParamSpec, ...]
    weights: str

    @property
    def parameters(self) -> int:
        """Number of parameters, tied copies counted once."""
        return sum(math.prod(row.stacked_shape(self.spec)) for row in self.rows if row.tied_to is None)

    @property
    def dtype(self) -> str | None:
        """Name of the dtype that config.json says the weights are stored in."""
        told = self.config.get("dtype") or self.config.get("torch_dtype")
        return told if isinstance(told, str) else None

    @property
    def bytes(self) -> int:
        """Size of the weights in their stored dtype (float32 if the config does not say)."""
        return self.parameters * (2 if self.dtype in ("bfloat16", "float16") else 4)


def examine(recipe: Recipe, *, texts: bool = True) -> dict[str, Any]:
    """The report on a recipe's source and target, of plain values; `texts` says whether its texts are to be read.

    Whatever stands in the way of a merge is listed in `problems`, not raised: `mergeable` is false then. What the
    others could not be found out without is None.
    """
    problems: list[str] = []
    notes: list[str] = []
    sides = {
        name: _tried(problems, lambda n=name: _side(n, recipe.place(getattr(recipe, n))))
        for name in ("target", "source")
    }
    tokenizers = {
        name: _tried(problems, lambda s=side: load_tokenizer(s.directory)) if side else None
        for name, side in sides.items()
    }
    widths = [side.spec.hidden for side in sides.values() if side]
    layout = _tried(problems, lambda: Layout(recipe.mesh or AUTO, widths))
    report: dict[str, Any] = {
        "mergeable": False,
        "problems": problems,
        "notes": notes,
        "models": {name: _model(side) if side else None for name, side in sides.items()},
        "projections": None,
        "differences": None,
        "tokenizers": None,
        "rows": None,
        "memory": None,
        "time": None,
    }
    for name, side in sides.items():
        if side and side.weights == "missing":
            notes.append(f"{name} {side.directory} holds no weights; they were not needed here")
        if side and tokenizers[name] and len(tokenizers[name].fast) > side.spec.vocab:
            problems.append(
                f"{name}: the tokenizer has {len(tokenizers[name].fast)} tokens, the embedding {side.spec.vocab} rows"
            )
        if side and layout:
            _tried(problems, lambda s=side: [layout.param_sharding(r.path, r.axes, r.shape(s.spec)) for r in s.rows])
    if all(tokenizers.values()):
        report["tokenizers"] = overlap(tokenizers["target"], tokenizers["source"])
        if report["tokenizers"]["share_of_target"] < 0.05:
            notes.append("the tokenizers share next to no token: rows pair whole words, as they do in any case")
    reading = _tried(problems, lambda: _reading(recipe, tokenizers)) if texts and all(tokenizers.values()) else ASSUMED
    if all(sides.values()):
        target, source = sides["target"], sides["source"]
        report["differences"] = differences(target.spec, source.spec)
        report["projections"] = mapped(target, source, recipe)
        chosen = _tried(problems, lambda: shared_projections(target.rows, source.rows, recipe.fusion.roles))
        if chosen is not None and not chosen:
            problems.append("the two models share no projection that could be transported")
        solvable = _tried(problems, lambda: _require_solver(recipe, target, source, chosen or {}))
        if chosen and reading and layout and solvable:
            report["rows"] = dataclasses.asdict(reading)
            sites = sites_of(target, source, chosen, recipe.alignment.structure)
            # Of rows that are only assumed it is no more than a hint.
            _tried(notes if reading.assumed else problems, lambda: require_room(sites, reading.rows, recipe))
            shards = layout.sizes["fsdp"] * layout.sizes["tensor"]
            report["memory"] = memory(target, source, sites, chosen, reading, recipe, shards)
            rebuilt = {site for site, item in report["memory"]["sites"].items() if item["kept_as"] != "dense"}
            report["time"] = time(target, source, sites, chosen, reading, recipe, layout.devices, rebuilt)
            held = report["memory"]["available"]
            if held and report["memory"]["peak"] > held:
                notes.append(
                    f"the estimated peak of {report['memory']['peak'] / 2**30:.1f} GiB is more than this machine's"
                    f" {held / 2**30:.1f} GiB; see activations.keep, alignment.layer_pairs and --mesh"
                )
    report["mergeable"] = not problems
    return report


def _tried(problems: list[str], work: Any) -> Any:
    """The result of `work`, or None with the user's error among the problems (or notes)."""
    try:
        return work()
    except InputError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None


def _side(name: str, model: str) -> Side:
    directory = resolve(model, weights=False)
    weights = "missing"
    if is_orbax(directory):
        directory, weights = directory / "hf", "orbax"
    for kind, files in (("PyTorch", (BIN_SINGLE_NAME, BIN_INDEX_NAME)), ("safetensors", (SINGLE_NAME, INDEX_NAME))):
        weights = kind if any((directory / file).is_file() for file in files) else weights
    try:
        config = read_config(directory)
        family = family_of(config)
        spec = family.spec(config)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return Side(name, directory, config, spec, family.params(spec), weights)


def _model(side: Side) -> dict[str, Any]:
    spec = side.spec
    return {
        "path": str(side.directory),
        "family": side.config["model_type"],
        "parameters": side.parameters,
        "layers": spec.layers,
        "hidden": spec.hidden,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "mlp": spec.mlp,
        "vocab": spec.vocab,
        "tied_embeddings": spec.tied_embeddings,
        "dtype": side.dtype,
        "bytes": side.bytes,
        "weights": side.weights,
    }


def _rotary(rotary: Rotary, head_dim: int) -> str:
    if rotary.scaling == "none":
        return "none"
    scaled = rotary.scaling if rotary.scaling in ("default", "longrope") else f"{rotary.scaling} x {rotary.factor:g}"
    kind = ", interleaved" if rotary.interleaved else ""
    return f"theta {rotary.theta:g}, {scaled}, {rotary.dims(head_dim)} of {head_dim} dimensions{kind}"


def _windows(spec: DecoderSpec) -> str:
    sizes = [window for window in spec.layer_windows if window != FULL_ATTENTION]
    return f"{len(sizes)} of {spec.layers} layers, {max(sizes)} tokens" if sizes else "none"


def differences(target: DecoderSpec, source: DecoderSpec) -> list[dict[str, Any]]:
    """What the two architectures do in attention, positions and MLP: `what`, `target`, `source`, `same`."""

    def facts(spec: DecoderSpec) -> dict[str, str]:
        norms = [kind for kind, held in (("before", spec.pre_norm), ("after", spec.post_norm)) if held]
        return {
            "head_dim": str(spec.head_dim),
            "query heads per KV head": str(spec.heads // spec.kv_heads),
            "rotary": _rotary(spec.rotary, spec.head_dim),
            "rotary of windowed layers": "same"
            if len(spec.rotaries) == 1
            else _rotary(spec.rotaries[1], spec.head_dim),
            "layers of the second rotary": str(sum(spec.layer_rotaries)),
            "learned positions": "yes" if spec.learned_positions else "no",
            "qk norm": spec.qk_norm,
            "windows": _windows(spec),
            "MLP": ("gated, " if spec.gated else "plain, ") + spec.activation,
            "norm": f"{spec.norm}, {' and '.join(norms)} each branch" + (", parallel" if spec.parallel else ""),
            "biases (qkv, o, MLP)": ", ".join(
                "yes" if b else "no" for b in (spec.qkv_bias, spec.o_bias, spec.mlp_bias)
            ),
            "caps (attention, logits)": f"{spec.attention_cap or 'none'}, {spec.logit_cap or 'none'}",
        }

    ours, theirs = facts(target), facts(source)
    return [
        {"what": what, "target": ours[what], "source": theirs[what], "same": ours[what] == theirs[what]}
        for what in ours
    ]


def mapped(target: Side, source: Side, recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """`mapped`: projections that both models have, with shapes [out, in]; `left_out`: the others, with the reason."""
    ours, theirs = projections(target.rows), projections(source.rows)
    both, rest = [], []
    for role in dict.fromkeys((*ours, *theirs)):
        if role not in ours or role not in theirs:
            lacking = "source" if role in ours else "target"
            rest.append({"role": role, "reason": f"the {lacking} has none"})
        elif recipe.fusion.roles is not None and role not in recipe.fusion.roles:
            rest.append({"role": role, "reason": "not in fusion.roles"})
        else:
            shapes = [list(row[role].shape(side.spec)) for row, side in ((ours, target), (theirs, source))]
            both.append({"role": role, "target_shape": shapes[0], "source_shape": shapes[1]})
    for kind in ("embeddings and head", "norms"):
        rest.append({"role": kind, "reason": "stay the target's"})
    return {"mapped": both, "left_out": rest}


def _require_solver(recipe: Recipe, target: Side, source: Side, chosen: Mapping[str, ParamSpec]) -> bool:
    solver = solver_of(recipe.alignment)
    if not recipe.activations.keep:
        require_streamable(recipe.alignment)
    if capabilities_of(solver).equal_sizes:
        for site, units in sites_of(target, source, chosen, recipe.alignment.structure).units.items():
            if units[0] != units[1]:
                raise InputError(
                    f"solver {solver.name!r} needs equal sizes; {site} has {units[0]} and {units[1]} units"
                )
    return True


def _reading(recipe: Recipe, tokenizers: Mapping[str, TextTokenizer]) -> Reading:
    options = recipe.activations
    texts = read_texts(recipe.place(recipe.texts)).first(options.max_texts)
    both = [tokenizers["target"], tokenizers["source"]]
    rows, documents = pair_rows(texts, both, pooling=options.pooling, max_tokens=options.max_tokens)
    tokens = [sum(len(document.ids) for document in model) for model in documents]
    return Reading(rows=len(rows), target_tokens=tokens[0], source_tokens=tokens[1], assumed=False)


def _byte_table() -> dict[str, int]:
    """The printable characters by which byte-level vocabularies write bytes (Radford et al. 2019, GPT-2's encoder)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_strings(tokenizer: TextTokenizer) -> set[bytes]:
    """What the ordinary tokens of a vocabulary stand for, in UTF-8, however it writes spaces and bytes."""
    vocabulary = tokenizer.fast.get_vocab()
    table = _byte_table()
    byte_level = any(token.startswith("Ġ") for token in vocabulary) and not any("▁" in token for token in vocabulary)
    found = set()
    for token, number in vocabulary.items():
        if number in tokenizer.special_ids:
            continue
        if byte_level and all(character in table for character in token):
            found.add(bytes(table[character] for character in token))
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found.add(bytes.fromhex(token[3:5]))
        else:
            found.add(token.replace("▁", " ").encode(errors="replace"))
    return found


def overlap(target: TextTokenizer, source: TextTokenizer) -> dict[str, Any]:
    """Sizes, shared token strings (spaces and bytes read alike whatever the vocabulary's spelling), special tokens."""
    ours, theirs = token_strings(target), token_strings(source)
    shared = len(ours & theirs)
    special = {
        name: {str(token): fast.convert_tokens_to_ids(str(token)) for token in fast.all_special_tokens}
        for name, fast in (("target", target.fast), ("source", source.fast))
    }
    return {
        "target": len(target.fast),
        "source": len(source.fast),
        "shared": shared,
        "share_of_target": shared / max(len(ours), 1),
        "share_of_source": shared / max(len(theirs), 1),
        "identical": target.fast.get_vocab() == source.fast.get_vocab(),
        "special": special,
    }
