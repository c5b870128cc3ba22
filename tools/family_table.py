"""Measures every family against transformers' PyTorch model of the same tiny random weights and prints a table.

    python -m tools.family_table                      # all families, a minute on two CPU cores
    python -m tools.family_table gemma2 phi3          # some
    python -m tools.family_table --cases              # a row for every case, not one for every family

Needs torch (`pip install torch`). The cases are those of `tests/models/test_parity.py`: 500 tokens in float32, a
right-padded batch, the reference in float64; figures are the worst of a family's cases. `deviation` is the largest
difference of two logits over the logits' standard deviation, `KL` the mean per token. `lines` are those of the family's
file that are neither blank nor comment nor the first of a docstring.
"""

import inspect
import logging
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer

from tmjax.checkpoints import hf
from tmjax.checkpoints.formats.safetensors import SINGLE_NAME
from tmjax.checkpoints.load import load_model
from tmjax.cli import run
from tmjax.errors import InputError
from tmjax.models import families
from tmjax.models.decoder import forward
from tmjax.models.families import FAMILIES
from tools.family_cases import CASES, deviation, make_reference, mean_kl, padded_batch, reference_logits

#: Models that each `model_type` is the architecture of.
EXAMPLES = {
    "arcee": "Arcee AFM",
    "bloom": "BLOOM, BLOOMZ",
    "codegen": "CodeGen",
    "cohere": "Command R, Aya 23",
    "deepseek_v2": "DeepSeek V2, V2 Lite, Coder V2",
    "deepseek_v3": "DeepSeek V3, V3.1, R1, Kimi K2, K2.5",
    "deepseek_v32": "DeepSeek V3.2",
    "glm4_moe_lite": "GLM 4.7 Flash",
    "glm_moe_dsa": "GLM 5, 5.1, 5.2",
    "cohere2": "Command R7B, Command A",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B, 300B-A47B",
    "falcon": "Falcon 7B, 40B, 180B, RW, Falcon 2 11B",
    "gemma": "Gemma, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 1B and the text part of others",
    "glm4_moe": "GLM 4.5, 4.6",
    "ernie4_5": "ERNIE 4.5 (dense)",
    "exaone4": "EXAONE 4",
    "glm": "GLM 4 (9B)",
    "glm4": "GLM-4-0414, GLM-Z1",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "Pythia, GPT-NeoX-20B",
    "gpt_oss": "gpt-oss 20B, 120B",
    "gptj": "GPT-J",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 1B-A400M, 3B-A800M",
    "helium": "Helium",
    "llama": "Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM 2",
    "minimax_m2": "MiniMax M2, M2.5, M2.7",
    "mistral": "Mistral 7B, Nemo, Small",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "mpt": "MPT 7B, 30B",
    "olmo2": "OLMo 2",
    "olmoe": "OLMoE 1B-7B",
    "nemotron": "Nemotron 3 and 4, Minitron",
    "olmo3": "OLMo 3",
    "opt": "OPT but 350m",
    "phi": "Phi 1, 1.5, 2",
    "phi3": "Phi 3, 3.5, 4",
    "qwen2": "Qwen 2, 2.5",
    "qwen2_moe": "Qwen 1.5 MoE A2.7B, Qwen 2 57B-A14B",
    "qwen3": "Qwen 3 (dense)",
    "qwen3_moe": "Qwen 3 30B-A3B, 235B-A22B, Coder",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM 3",
    "stablelm": "StableLM 2, StableLM 3B",
    "starcoder2": "StarCoder 2",
    "xglm": "XGLM",
}


@dataclass(frozen=True)
class Measured:
    """One case: figures of its logits, whether the checkpoint comes back byte for byte."""

    deviation: float
    kl: float
    identical: bool


def measure(name: str) -> Measured:
    """Compares our logits of a case with PyTorch's, and what we export with what we loaded."""
    ids, real = padded_batch()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        reference = make_reference(name, directory)
        theirs = reference_logits(reference, ids, real)[real]
        model = load_model(directory)
        with jax.numpy_dtype_promotion("strict"):
            ours = np.asarray(forward(model.spec, dict(model.params), ids))[real]
        out = hf.export(model, Path(scratch) / "again")
        identical = (out / SINGLE_NAME).read_bytes() == (directory / SINGLE_NAME).read_bytes()
    return Measured(deviation(ours, theirs), mean_kl(ours, theirs), identical)


def worst(measured: Iterable[Measured]) -> Measured:
    """The largest figures of several cases."""
    found = list(measured)
    return Measured(max(m.deviation for m in found), max(m.kl for m in found), all(m.identical for m in found))


def lines(model_type: str) -> int:
    """Lines of code of the family's file."""
    folder = Path(inspect.getfile(families)).parent
    file = next(file for file in folder.glob("*.py") if f'FAMILY = Family("{model_type}"' in file.read_text())
    code = (line.strip() for line in file.read_text().splitlines())
    return sum(bool(line) and not line.startswith(("#", '"""')) for line in code)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def family_table(
    chosen: Annotated[list[str] | None, typer.Argument(metavar="[FAMILY]...", help="model types; default: all")] = None,
    cases: Annotated[bool, typer.Option("--cases", help="a row for every case")] = False,
) -> None:
    """Prints how closely every family follows transformers, as a Markdown table."""
    chosen = chosen or sorted(FAMILIES)
    unknown = sorted(set(chosen) - FAMILIES.keys())
    if unknown:
        raise InputError(f"{', '.join(unknown)} is no family; there are {', '.join(sorted(FAMILIES))}")
    _quiet()
    print("| family | models | deviation | KL | same bytes | lines |\n|---|---|---|---|---|---|", flush=True)
    for model_type in chosen:
        names = [name for name, config in CASES.items() if config["model_type"] == model_type]
        found = {name: measure(name) for name in names}
        rows = found if cases else {f"{model_type} ({len(names)} cases)": worst(found.values())}
        for name, m in rows.items():
            same = "yes" if m.identical else "no"
            about = f"{m.deviation:.1e} | {m.kl:.1e} | {same} | {lines(model_type)}"
            print(f"| {name} | {EXAMPLES.get(model_type, '')} | {about} |", flush=True)


def _quiet() -> None:
    """No progress bars and warnings of transformers between the rows."""
    try:
        import torch  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing: the reference models are PyTorch's, install torch") from None
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run(arguments, application=app, name="family_table")


if __name__ == "__main__":
    sys.exit(main())
