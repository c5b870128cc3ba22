"""Comparison of two models: architecture, aligned projections, vocabularies."""

from typing import Any

from tmjax.align.structure.planes import planes_of
from tmjax.commands.doctor.side import Side
from tmjax.models.alibi import slopes
from tmjax.models.spec import FULL_ATTENTION, DecoderSpec, Rotary, projections
from tmjax.text.tokenizer import TextTokenizer
from tmjax.transfer.chain import named_roles
from tmjax.transfer.operator import Chain


def _rotary(rotary: Rotary, head_dim: int) -> str:
    if rotary.scaling == "none":
        return "none"
    scaled = rotary.scaling if rotary.scaling in ("default", "longrope") else f"{rotary.scaling} x {rotary.factor:g}"
    kind = ", interleaved" if rotary.interleaved else ""
    return f"theta {rotary.theta:g}, {scaled}, {rotary.dims(head_dim)} of {head_dim} dimensions{kind}"


def _windows(spec: DecoderSpec) -> str:
    sizes = [window for window in spec.layer_windows if window != FULL_ATTENTION]
    return f"{len(sizes)} of {spec.layers} layers, {max(sizes)} tokens" if sizes else "none"


def _mlp(spec: DecoderSpec) -> str:
    kind = ("gated, " if spec.gated else "plain, ") + spec.activation
    experts = spec.experts
    if experts is None:
        return kind
    shared = f", a shared one of {experts.shared_width}" if experts.shared_width else ""
    dense = f", {len(experts.dense)} layers without" if experts.dense else ""
    return f"{kind}; {experts.chosen} of {experts.count} experts of {experts.width} units{shared}{dense}"


def _alibi(spec: DecoderSpec) -> str:
    if spec.alibi is None:
        return "none"
    slope = slopes(spec.heads) * spec.alibi.scale
    return f"slopes {slope.min():.2g} to {slope.max():.2g}"


def attention_notes(target: DecoderSpec, source: DecoderSpec, structure: str) -> list[str]:
    """Remarks on what an alignment of attention cannot carry over; `structure` is that of the alignment."""
    notes = []
    planes = [planes_of(spec.rotaries[spec.layer_rotaries[0]], spec.head_dim) for spec in (target, source)]
    turning, still = ([len(getattr(each, name)) for each in planes] for name in ("pairs", "still"))
    if structure != "none" and min(turning) == min(still) == 0:
        turns, stays = ("source", "target") if turning[1] else ("target", "source")
        notes.append(
            f"queries and keys of the {turns} turn with their position, those of the {stays} do not: q and k of the"
            " source are left out of a structured alignment, v and o are transported"
        )
    if target.alibi != source.alibi:
        notes.append("biases of scores by distance (ALiBi) are no weights: the target keeps its own or has none")
    if target.sinks or source.sinks:
        notes.append("attention sinks are not transported: the target keeps its own or has none")
    return notes


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
            "sinusoidal positions": "yes" if spec.sinusoidal_positions else "no",
            "biases by distance (ALiBi)": _alibi(spec),
            "attention sinks": "yes" if spec.sinks else "no",
            "norm of embeddings": "yes" if spec.embedding_norm else "no",
            "qk norm": spec.qk_norm,
            "windows": _windows(spec),
            "MLP": _mlp(spec),
            "norm": f"{spec.norm}, {' and '.join(norms)} each branch" + (", parallel" if spec.parallel else ""),
            "biases (qkv, o, MLP, head)": ", ".join(
                "yes" if b else "no" for b in (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.head_bias)
            ),
            "caps (attention, logits)": f"{spec.attention_cap or 'none'}, {spec.logit_cap or 'none'}",
        }

    ours, theirs = facts(target), facts(source)
    return [
        {"what": feature, "target": ours[feature], "source": theirs[feature], "same": ours[feature] == theirs[feature]}
        for feature in ours
    ]


def mapped(target: Side, source: Side, chain: Chain) -> dict[str, list[dict[str, Any]]]:
    """Lists the projections that are aligned.

    Returns:
        `mapped`: projections that both models have, with shapes [out, in]; `left_out`: the others, with the reason.
    """
    ours, theirs = projections(target.rows), projections(source.rows)
    named, both, rest = named_roles(chain), [], []
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


def tokenizer_faults(name: str, tokenizer: TextTokenizer, rows: int) -> tuple[list[str], list[str]]:
    """Returns problems and notes of a tokenizer and an embedding of `rows` rows that differ in size."""
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
    """Compares two vocabularies: sizes, special tokens, shared token strings (in one spelling of spaces and bytes)."""
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
