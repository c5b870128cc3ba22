"""Report on a pair of models before any weight is read: compatibility, mapped projections, memory and time.

Only config.json, the tokenizers' files and the headers of the weights are read, and the texts if they are given.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmjax.align.alignment import solver_of
from tmjax.align.sizes import require_room, row_budget, sites_of
from tmjax.align.streaming import require_streamable
from tmjax.checkpoints.description import describe
from tmjax.checkpoints.formats.container import any_weights, no_weights
from tmjax.checkpoints.formats.weights import has_safetensors, weight_files
from tmjax.checkpoints.headers import open_headers
from tmjax.checkpoints.hub import resolve
from tmjax.checkpoints.orbax import is_orbax
from tmjax.commands.doctor.estimate import Reading, memory, time
from tmjax.commands.merge.inputs import WITHOUT
from tmjax.errors import InputError
from tmjax.models.spec import FULL_ATTENTION, DecoderSpec, ParamSpec, Rotary, projections
from tmjax.ot import ShapeCheckingSolver
from tmjax.recipes.merge import Recipe
from tmjax.sharding.mesh import AUTO, Layout
from tmjax.teacher.vocabulary_map import few_shared, require_shared
from tmjax.text.documents import read_texts
from tmjax.text.rows import pair_rows
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.transfer.chain import aligns, chain_of, chain_projections, needs_of
from tmjax.transfer.operator import Chain

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
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters, tied copies counted once."""
        return sum(math.prod(row.stacked_shape(self.spec)) for row in self.rows if row.tied_to is None)

    @property
    def dtype(self) -> str | None:
        """Name of the stored dtype of the weights according to config.json."""
        stored = self.config.get("dtype") or self.config.get("torch_dtype")
        return stored if isinstance(stored, str) else None

    @property
    def bytes(self) -> int:
        """Size of the weights in their stored dtype (float32 if the config names none)."""
        return self.parameters * (2 if self.dtype in ("bfloat16", "float16") else 4)


def examine(recipe: Recipe, *, texts: bool = True) -> dict[str, Any]:
    """Reports on a recipe's source and target in plain values; with `texts`, its texts are read.

    Obstacles to a merge are listed in `problems`, not raised; `mergeable` is false then. Parts of the report that
    depend on a failed part are None.
    """
    problems: list[str] = []
    notes: list[str] = []
    sides = {
        name: _tried(problems, lambda n=name: _side(n, recipe.place(getattr(recipe, n)), problems))
        for name in ("target", "source")
    }
    tokenizers = {
        name: _tried(problems, lambda s=side: load_tokenizer(s.directory, s.spec.vocab)) if side else None
        for name, side in sides.items()
    }
    chain = _tried(problems, lambda: chain_of(recipe))
    widths = [side.spec.hidden for side in sides.values() if side]
    layout = _tried(problems, lambda: Layout(recipe.mesh or AUTO, widths))
    report: dict[str, Any] = {
        "mergeable": False,
        "problems": problems,
        "notes": notes,
        "models": {name: _model(side) if side else None for name, side in sides.items()},
        "operators": operators(chain) if chain else None,
        "projections": None,
        "differences": None,
        "tokenizers": None,
        "rows": None,
        "memory": None,
        "time": None,
    }
    for name, side in sides.items():
        notes += [f"{name}: {note}" for note in side.notes] if side else []
        if side and side.weights == "missing":
            notes.append(f"{name} {side.directory} holds no weights; they were not needed here")
        if side and tokenizers[name]:
            for lines, added in zip((problems, notes), _rows(name, tokenizers[name], side.spec.vocab), strict=True):
                lines += added
        if side and layout:
            _tried(problems, lambda s=side: [layout.param_sharding(r.path, r.axes, r.shape(s.spec)) for r in s.rows])
    if all(tokenizers.values()):
        report["tokenizers"] = overlap(tokenizers["target"], tokenizers["source"])
        if report["tokenizers"]["share_of_target"] < 0.05:
            notes.append("the tokenizers share next to no token: rows pair whole words, as they do in any case")
        if texts and chain and "teacher" in needs_of(chain):
            shared = _tried(problems, lambda: _shared_positions(recipe, tokenizers))
            few = shared and few_shared(*shared)
            notes += [few] if few else []
    reading = _tried(problems, lambda: _reading(recipe, tokenizers)) if texts and all(tokenizers.values()) else ASSUMED
    if all(sides.values()):
        target, source = sides["target"], sides["source"]
        report["differences"] = differences(target.spec, source.spec)
        report["projections"] = mapped(target, source, chain or ())
        chosen = _tried(problems, lambda: chain_projections(chain or (), target.rows, source.rows))
        aligned = chain is None or aligns(chain)
        if aligned and chosen is not None and not chosen:
            problems.append("the two models share no projection that could be transported")
        solvable = _tried(problems, lambda: _require_solver(recipe, target, source, chosen or {}))
        if chosen and reading and layout and solvable:
            sites = sites_of(target, source, chosen, recipe.alignment.structure)
            limit = row_budget(sites, (target.spec.layers, source.spec.layers), recipe.activations)
            reading = dataclasses.replace(reading, rows=min(reading.rows, limit or reading.rows))
            report["rows"] = dataclasses.asdict(reading)
            rows = reading.rows if recipe.activations.keep else 0
            # With assumed rows a lack of room is only a hint.
            if aligned:
                _tried(notes if reading.assumed else problems, lambda: require_room(sites, rows, recipe.alignment))
            shards = layout.sizes["fsdp"] * layout.sizes["tensor"]
            report["memory"] = memory(target, source, sites, reading, recipe, shards)
            rebuilt = {site for site, item in report["memory"]["sites"].items() if item["kept_as"] != "dense"}
            report["time"] = time(target, source, sites, chosen, reading, recipe, layout.devices, rebuilt)
            available = report["memory"]["available"]
            if available and report["memory"]["peak"] > available:
                notes.append(
                    f"the estimated peak of {report['memory']['peak'] / 2**30:.1f} GiB is more than this machine's"
                    f" {available / 2**30:.1f} GiB; see activations.keep, alignment.layer_pairs and --mesh"
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


def _side(name: str, model: str, problems: list[str]) -> Side:
    """Describes one model by its config; adds faults of its weights, according to their headers, to the problems."""
    directory = resolve(model, weights=False)
    orbax = is_orbax(directory)
    try:
        described = describe(directory / "hf" if orbax else directory)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    weights, notes = "orbax" if orbax else "missing", described.notes
    if not orbax and weight_files(directory):
        weights = "safetensors" if has_safetensors(directory) else "PyTorch"
        try:
            notes = open_headers(described).notes
        except InputError as error:
            problems.append(f"{name}: {error}")
    elif not orbax and any_weights(directory):
        problems.append(f"{name}: {no_weights(directory)}")
    return Side(name, described.directory, described.config, described.spec, described.rows, weights, notes)


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
    """Compares attention, positions and MLP of the two architectures: `what`, `target`, `source`, `same`."""

    def facts(spec: DecoderSpec) -> dict[str, str]:
        norms = [kind for kind, present in (("before", spec.pre_norm), ("after", spec.post_norm)) if present]
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
        {"what": feature, "target": ours[feature], "source": theirs[feature], "same": ours[feature] == theirs[feature]}
        for feature in ours
    ]


def operators(chain: Chain) -> list[dict[str, Any]]:
    """Returns the operators that run, in order, with their needs and whether they choose on validation texts."""
    return [
        {"name": step.operator.name, "needs": sorted(step.operator.needs), "chooses": step.operator.chooses}
        for step in chain
    ]


def mapped(target: Side, source: Side, chain: Chain) -> dict[str, list[dict[str, Any]]]:
    """Lists the projections that are aligned.

    Returns:
        `mapped`: projections that both models have, with shapes [out, in]; `left_out`: the others, with the reason.
    """
    ours, theirs = projections(target.rows), projections(source.rows)
    asked = [getattr(step.options, "roles", None) for step in chain if "alignment" in step.operator.needs]
    named = None if not asked or None in asked else {role for roles in asked for role in roles}
    both, rest = [], []
    for role in dict.fromkeys((*ours, *theirs)):
        if role not in ours or role not in theirs:
            lacking = "source" if role in ours else "target"
            rest.append({"role": role, "reason": f"the {lacking} has none"})
        elif named is not None and role not in named:
            rest.append({"role": role, "reason": "not in the roles of any operator"})
        else:
            shapes = [list(row[role].shape(side.spec)) for row, side in ((ours, target), (theirs, source))]
            both.append({"role": role, "target_shape": shapes[0], "source_shape": shapes[1]})
    return {"mapped": both, "left_out": rest}


def _require_solver(recipe: Recipe, target: Side, source: Side, chosen: Mapping[str, ParamSpec]) -> bool:
    solver = solver_of(recipe.alignment)
    if not recipe.activations.keep:
        require_streamable(recipe.alignment)
    if isinstance(solver, ShapeCheckingSolver):
        for site, units in sites_of(target, source, chosen, recipe.alignment.structure).units.items():
            try:
                solver.check_shape(*units)
            except InputError as error:
                raise InputError(f"site {site}: {error}") from None
    return True


def _reading(recipe: Recipe, tokenizers: Mapping[str, TextTokenizer]) -> Reading:
    options = recipe.activations
    texts = read_texts(recipe.place(recipe.texts)).first(options.max_texts)
    both = [tokenizers["target"], tokenizers["source"]]
    rows, documents = pair_rows(texts, both, pooling=options.pooling, max_tokens=options.max_tokens)
    tokens = [sum(len(document.ids) for document in model) for model in documents]
    return Reading(rows=len(rows), target_tokens=tokens[0], source_tokens=tokens[1], assumed=False)


def _shared_positions(recipe: Recipe, tokenizers: Mapping[str, TextTokenizer]) -> tuple[int, int]:
    texts = read_texts(recipe.texts).part(recipe.activations.max_texts, recipe.seed).texts
    return require_shared(tokenizers["target"], tokenizers["source"], texts, otherwise=WITHOUT)


def _rows(name: str, tokenizer: TextTokenizer, rows: int) -> tuple[list[str], list[str]]:
    """Problems and notes where a tokenizer and an embedding of `rows` rows are not of the same size."""
    known = tokenizer.known(rows)
    problems, notes = [], []
    if known is not None:
        padded = int((~known).sum())
        notes.append(f"{name}: {padded} of the embedding's {rows} rows are no tokens; they stay as they are")
    vocabulary = tokenizer.vocabulary
    beyond = sorted(number for number in (*vocabulary.text, *vocabulary.special) if number >= rows)
    if any(number >= rows for number in tokenizer.backend.get_vocab(with_added_tokens=False).values()):
        problems.append(f"{name}: the tokenizer has {tokenizer.size} tokens, the embedding {rows} rows")
    elif beyond:
        notes.append(
            f"{name}: {len(beyond)} added tokens lie beyond the embedding's {rows} rows, the first is "
            f"{tokenizer.backend.id_to_token(beyond[0])!r}; a text that holds one is refused"
        )
    return problems, notes


def overlap(target: TextTokenizer, source: TextTokenizer) -> dict[str, Any]:
    """Sizes, shared token strings (spaces and bytes read alike whatever the vocabulary's spelling), special tokens."""
    ours, theirs = target.vocabulary.ids, source.vocabulary.ids
    shared = len(ours.keys() & theirs.keys())
    special = {
        name: {str(token): each.backend.token_to_id(str(token)) for token in each.fast.all_special_tokens}
        for name, each in (("target", target), ("source", source))
    }
    return {
        "target": target.backend.get_vocab_size(),
        "source": source.backend.get_vocab_size(),
        "shared": shared,
        "share_of_target": shared / max(len(ours), 1),
        "share_of_source": shared / max(len(theirs), 1),
        "identical": target.backend.get_vocab() == source.backend.get_vocab(),
        "special": special,
    }
