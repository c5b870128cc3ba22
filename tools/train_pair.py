"""Trains a source and a target like the bundled pair, with our own models and trainer, and prints their bits per byte.

    python tools/train_pair.py --texts experiments --out runs/pair

`--texts` is a folder that holds, itself or below it, for every language `LANGUAGE.target-train.jsonl`,
`LANGUAGE.calibration.jsonl` and `LANGUAGE.rest.jsonl` (or `LANGUAGE.train.jsonl`), `LANGUAGE.valid.jsonl` and
`LANGUAGE.test.jsonl`. The target learns from the target-train file of one language, the source from all training text
of several. Both are written as Hugging Face checkpoints, `OUT/source` and `OUT/target`, each with its own byte-level
BPE tokenizer.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import jax
import tokenizers
import typer

from tmjax.checkpoints.hf import export
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.cli import run
from tmjax.errors import InputError
from tmjax.evaluate.bits import evaluate
from tmjax.files.atomic import refuse_existing, write_json
from tmjax.models.decoder import init_params
from tmjax.models.families import FAMILIES
from tmjax.models.spec import DecoderSpec
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.train.data import Batches
from tmjax.train.loop import Facts, Progress, train
from tmjax.train.optimizer import TrainConfig

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
#: Files of a language that may be trained on, and the one that a target sees.
TRAINING = ("train", "target-train", "calibration", "rest")
TARGET_TRAINING = ("target-train",)
#: Languages that the source learns where `--source-languages` does not say, as far as the folder has them.
SOURCE_LANGUAGES = ("swahili", "wolof")
#: Documents of each held-out file that are scored.
SCORED = 400


class Side(StrEnum):
    """The two models of a pair."""

    SOURCE = "source"
    TARGET = "target"


class Heldout(StrEnum):
    """Text that no model is trained on: choose settings with valid, look at test once."""

    VALID = "valid"
    TEST = "test"


@dataclass(frozen=True)
class Plan:
    """How one side is made: family, sizes, dtype on disk, optimiser."""

    family: str
    spec: DecoderSpec
    dtype: str
    config: TrainConfig


_SHARED = {"max_positions": 512, "head_dim": 32, "tied_embeddings": True}
PLANS = {
    Side.SOURCE: Plan(
        "llama",
        DecoderSpec(vocab=4096, hidden=192, layers=6, heads=6, kv_heads=3, mlp=512, **_SHARED),
        "bfloat16",
        TrainConfig(steps=1150, tokens_per_step=2048, lr=3e-3, warmup=100, weight_decay=0.3),
    ),
    Side.TARGET: Plan(
        "qwen2",
        DecoderSpec(vocab=2048, hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, qkv_bias=True, **_SHARED),
        "float32",
        # 1030 verses are soon learnt by heart: small batches and strong decay do better than large ones.
        TrainConfig(steps=800, tokens_per_step=512, lr=3e-3, warmup=80, weight_decay=2.0),
    ),
}


def find(folder: Path, language: str, kind: str) -> Path | None:
    """The file `LANGUAGE.KIND.jsonl` in the folder or below it."""
    return next(iter(sorted(folder.rglob(f"{language}.{kind}.jsonl"))), None)


def training_texts(folder: Path, language: str, kinds: Sequence[str] = TRAINING) -> list[str]:
    """All documents of a language's training files that are in the folder."""
    files = [file for kind in kinds if (file := find(folder, language, kind))]
    if not files:
        raise InputError(f"{folder} has no training text of {language}: no {language}.{kinds[0]}.jsonl")
    return [text for file in files for text in read_texts(str(file)).texts]


def train_tokenizer(texts: Sequence[str], vocab: int, directory: Path) -> TextTokenizer:
    """Trains a byte-level BPE tokenizer and writes it so that transformers loads it whatever the model type."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    # Without an unk_token, transformers would add one of its own to the tokenizer of a Qwen2 model.
    loading = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "unk_token": SPECIAL["pad_token"]}
    write_json(directory / "tokenizer_config.json", SPECIAL | loading)
    return load_tokenizer(directory)


def new_model(plan: Plan, tokenizer: TextTokenizer, directory: Path, seed: int) -> Model:
    """A model with fresh float32 parameters, its vocabulary as large as the tokenizer's."""
    family = FAMILIES[plan.family]
    spec = replace(plan.spec, vocab=tokenizer.size)
    ids = {f"{name}_id": tokenizer.backend.token_to_id(token) for name, token in SPECIAL.items()}
    write_json(directory / "generation_config.json", ids)
    config = family.config(spec) | ids | {"dtype": plan.dtype}
    return Model(family, spec, init_params(spec, jax.random.key(seed)), config, directory)


def reporter(name: str, steps: int) -> Progress:
    """Writes loss and seconds per step to standard error, now and then."""

    def progress(fact: Facts) -> None:
        if fact.step % 50 == 0 or fact.step == steps:
            pace = fact.seconds / fact.step
            print(
                f"{name} step {fact.step}/{steps}  loss {fact.loss:.3f}  {pace:.2f} s/step", file=sys.stderr, flush=True
            )

    return progress


def make(side: Side, plan: Plan, texts: Sequence[str], out: Path, *, seed: int, overwrite: bool) -> None:
    """Trains one side from scratch and writes its checkpoint to `out`."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = train_tokenizer(texts, plan.spec.vocab, Path(scratch))
        model = new_model(plan, tokenizer, Path(scratch), seed)
        documents = [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(texts)]
        print(
            f"{side}: {plan.family}, {model.size / 1e6:.2f}M parameters, {len(documents)} documents, "
            f"{sum(map(len, documents))} tokens",
            file=sys.stderr,
        )
        data = Batches(documents, tokens=plan.config.tokens_per_step, seed=seed, max_tokens=plan.spec.max_positions)
        result = train(model.spec, model.params, data, plan.config, progress=reporter(side, plan.config.steps))
        stored = {path: value.astype(plan.dtype) for path, value in result.params.items()}
        export(replace(model, params=stored), out, overwrite=overwrite)


def scores(
    out: Path, texts: Path, languages: Mapping[Side, Sequence[str]], heldout: Heldout
) -> dict[Side, dict[str, float]]:
    """Bits per byte of each model on every one of its languages that has a held-out file."""
    result = {}
    for side, learnt in languages.items():
        model = load_model(out / side)
        files = {name: find(texts, name, heldout) for name in learnt}
        result[side] = {
            name: evaluate(model, read_texts(str(file)).first(SCORED)).bits_per_byte
            for name, file in files.items()
            if file
        }
    return result


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train_pair(
    texts: Annotated[Path, typer.Option(help="folder with LANGUAGE.KIND.jsonl files in it or below")],
    out: Annotated[Path, typer.Option(help="where source/ and target/ are written")],
    target_language: Annotated[str, typer.Option(help="what the target learns")] = "swahili",
    source_languages: Annotated[
        str | None, typer.Option(help="comma-separated; default: swahili,wolof, as far as the folder has them")
    ] = None,
    seed: Annotated[int, typer.Option(help="of initialisation and data order")] = 0,
    steps_source: Annotated[int, typer.Option()] = PLANS[Side.SOURCE].config.steps,
    steps_target: Annotated[int, typer.Option()] = PLANS[Side.TARGET].config.steps,
    tokens_source: Annotated[int, typer.Option(help="per step, padding included")] = (
        PLANS[Side.SOURCE].config.tokens_per_step
    ),
    tokens_target: Annotated[int, typer.Option(help="per step")] = PLANS[Side.TARGET].config.tokens_per_step,
    only: Annotated[Side | None, typer.Option(help="train and score one side")] = None,
    heldout: Annotated[Heldout, typer.Option(help="what is scored")] = Heldout.TEST,
    overwrite: Annotated[bool, typer.Option(help="replace existing checkpoints")] = False,
) -> None:
    """Trains a source and a target and prints their bits per byte."""
    if not texts.is_dir():
        raise InputError(f"{texts} is not a folder of texts")
    if source_languages is None:
        learnt = [name for name in SOURCE_LANGUAGES if any(texts.rglob(f"{name}.*.jsonl"))] or [target_language]
    else:
        learnt = [name.strip() for name in source_languages.split(",")]
    wanted = {
        Side.SOURCE: (steps_source, tokens_source, TRAINING, learnt),
        Side.TARGET: (steps_target, tokens_target, TARGET_TRAINING, [target_language]),
    }
    jobs = {}
    for side in [only] if only else list(Side):  # everything is checked before the first model is trained
        steps, tokens, kinds, names = wanted[side]
        refuse_existing(out / side, overwrite=overwrite)
        config = PLANS[side].config
        config = replace(config, steps=steps, tokens_per_step=tokens, warmup=min(config.warmup, max(steps, 0) // 10))
        material = [text for name in names for text in training_texts(texts, name, kinds)]
        jobs[side] = (replace(PLANS[side], config=config), material)
    for side, (plan, material) in jobs.items():
        make(side, plan, material, out / side, seed=seed, overwrite=overwrite)
    found = scores(out, texts, {side: wanted[side][3] for side in jobs}, heldout)
    print(f"| model | family | trained on | bits/byte, first {SCORED} {heldout} documents |\n|---|---|---|---|")
    for side, (plan, material) in jobs.items():
        figures = ", ".join(f"{name} {bits:.3f}" for name, bits in found[side].items())
        print(f"| {side} | {plan.family} | {len(material)} documents of {', '.join(wanted[side][3])} | {figures} |")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run(arguments, application=app, name="train_pair")


if __name__ == "__main__":
    sys.exit(main())
