"""What several test files share: small specs, and checkpoints as the safetensors library and `json` see them."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import yaml

from tmjax.checkpoints.formats.safetensors import SINGLE_NAME
from tmjax.checkpoints.load import load_model
from tmjax.errors import CheckpointError
from tmjax.models.blocks.low_rank import Latent
from tmjax.models.decoder import bind
from tmjax.models.experts.mixture import Experts
from tmjax.models.spec import Alibi, DecoderSpec, Rotary
from tmjax.text.buckets import bucket_length
from tmjax.typing import Params

SPEC = DecoderSpec(vocab=50, hidden=24, layers=3, heads=6, kv_heads=2, head_dim=8, mlp=40, max_positions=64)
QWEN2 = dataclasses.replace(SPEC, qkv_bias=True, tied_embeddings=True)
#: One of every kind of forward pass, on few tokens.
FORWARDS: dict[str, DecoderSpec] = {
    "llama": SPEC,
    "biases, tied": QWEN2,
    "windows": dataclasses.replace(SPEC, windows=(3, 10**9, 5)),
    "dynamic": dataclasses.replace(SPEC, rotary=Rotary(scaling="dynamic", factor=4.0, original_positions=16)),
    "longrope": dataclasses.replace(
        SPEC,
        rotary=Rotary(
            scaling="longrope", original_positions=32, short_factors=(1.0, 2.0, 3.0, 4.0), long_factors=(9.0,) * 4
        ),
    ),
    "two rotaries": dataclasses.replace(
        SPEC, rotary=Rotary(theta=10.0), local_rotary=Rotary(theta=1e6), layer_rotary=(0, 1, 0)
    ),
    "learned positions": dataclasses.replace(
        SPEC, learned_positions=True, rotary=Rotary(scaling="none"), norm="layer", norm_bias=True, gated=False
    ),
    "experts": dataclasses.replace(
        SPEC, experts=Experts(6, 2, 12, choice_bias=True, shared_width=8, shared_gate=True, dense=(1,))
    ),
    "latent": dataclasses.replace(
        SPEC, kv_heads=6, latent=Latent(10, 4, 6, 12, mscale=0.5), rotary=Rotary(fraction=0.5, interleaved=True)
    ),
    "caps, biases": dataclasses.replace(
        SPEC,
        attention_cap=2.0,
        logit_cap=3.0,
        logit_scale=0.5,
        inverse_layer_scale=True,
        rotary=Rotary(scaling="none"),
        alibi=Alibi(rounded=True),
        sinks=True,
        windows=(3, 10**9, 5),
        head_bias=True,
        embedding_norm=True,
        qkv_clip=0.5,
    ),
}


def forwards(tokens: int, *quick: str) -> list:
    """Parameters (name, tokens) of all forwards; those that `quick` does not name are slow."""
    return [pytest.param(name, tokens, marks=() if name in quick else pytest.mark.slow) for name in FORWARDS]


def texts_that_begin_alike(spec: DecoderSpec, generator: np.random.Generator, most: int) -> list[list[int]]:
    """Texts of all lengths up to the context, many of which begin alike, one twice."""
    roots = [generator.integers(0, spec.vocab, most).tolist() for _ in range(3)]
    texts = []
    for number in range(23):
        length = int(generator.integers(2, most + 1)) if number else most
        shared = int(generator.integers(1, length + 1))
        texts.append(roots[number % 3][:shared] + generator.integers(0, spec.vocab, length - shared).tolist())
    return [*texts, texts[5], [1, 2]]


def stored(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of every file, as the safetensors library parses it."""
    held = [item for file in directory.glob("*.safetensors") for item in safetensors.deserialize(file.read_bytes())]
    assert len({name for name, _ in held}) == len(held)
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in held}


def read_config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def edit_config(directory: Path, **changes) -> None:
    config = {key: value for key, value in (read_config(directory) | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict], object]) -> None:
    """Rewrites a single-file checkpoint after `change(tensors)`."""
    tensors = safetensors.numpy.load_file(directory / SINGLE_NAME)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / SINGLE_NAME, {"format": "pt"})


def refused(directory: Path, *fragments: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        load_model(directory)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@functools.partial(jax.jit, static_argnums=0)
def _following_nll(spec: DecoderSpec, params: Params, ids_t: jax.Array) -> jax.Array:
    model = bind(spec, params)
    hidden = model.run(ids_t[None, :-1]).hidden
    logs = jax.nn.log_softmax(model.logits(hidden[0]))
    return -jnp.take_along_axis(logs, ids_t[1:, None], axis=1)[:, 0]


def alone_nll(spec: DecoderSpec, params: Params, ids: Sequence[int]) -> float:
    """Sum of -ln p of all tokens of one text but its first: the text alone, in one row that is padded as a batch is."""
    padded = np.zeros(bucket_length(len(ids)), np.int32)
    padded[: len(ids)] = ids
    return float(np.asarray(_following_nll(spec, params, padded), np.float64)[: len(ids) - 1].sum())


def loop_collectives(program: str) -> list[tuple[str, int]]:
    """Collectives inside the loops of a compiled program (`compiled.as_text()`): operation, entries of its result."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opened:
            name = opened[1]
        bodies.setdefault(name, []).append(line)
    within, waiting = set(), re.findall(r"(?:body|condition)=%?([\w.\-]+)", program)
    while waiting:
        name = waiting.pop()
        if name not in within and name in bodies:
            within.add(name)
            waiting += re.findall(r"=\{?%?([\w.\-]+)", "\n".join(bodies[name]))
    moved = []
    for line in (line for name in within for line in bodies[name]):
        found = re.match(
            r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
            r"(?:-start)?\(",
            line,
        )
        if found:
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            sizes = [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]
            moved.append((found[2], sum(sizes)))
    return moved


def xla_flags(devices: int) -> str:
    """The flags of the suite with another number of devices: what they compile gives the same bits."""
    return re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])


def short_recipes(folder: Path) -> dict[str, str]:
    """Recipes of a merge with all operators and of an adaptation that take seconds, written to a folder."""
    short = {
        "mesh": "data=1",
        "coefficients": {"alphas": [0.1], "betas": [0.0]},
        "operators": [
            {"transport": {}},
            {"embeddings": {"alphas": [0.3], "kappas": [30.0]}},
            {"predictions": {"rounds": 1, "generated_texts": 4, "tokens": 8}},
        ],
        "evaluation": {"draws": 100},
    }
    training = {"steps": [6], "lr": [0.02], "warmup": 1, "tokens_per_step": 256, "row_lengths": 1, "validate_every": 2}
    adapting = {"mesh": "data=1", "training": training, "max_tokens": 8, "evaluation": {"draws": 100}}
    adapting |= {"generation": {"texts": 4, "tokens": 8, "foreign": 100.0, "repeat": 1}}
    for name, told in (("merge", short), ("adapt", adapting)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(told))
    return {name: str(folder / f"{name}.yaml") for name in ("merge", "adapt")}
