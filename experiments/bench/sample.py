"""Writing with our cache against transformers' `generate`: the same prompts, lengths and sampling, in turn.

    python experiments/bench/sample.py experiments/swahili/source

Prompts are the first one to seven words of validation verses; no row ends before its last token, so both write the same
number of tokens. PyTorch gets the threads that it is fastest with. Medians of warm runs; greedy texts must be equal.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tmjax.checkpoints.load import load_model
from tmjax.models.generate import DecodingOptions, generate
from tmjax.models.sample import Sampling
from tmjax.text.documents import read_texts
from tools.script import script

TEXTS = Path(__file__).resolve().parents[1] / "swahili/texts/swahili.valid.jsonl"
BATCH, NEW, REPEATS = 64, 64, 5
SETTINGS = {
    "greedy": (Sampling(), {"do_sample": False}),
    "temperature 0.8": (Sampling(0.8), {"do_sample": True, "temperature": 0.8, "top_k": 0}),
    "temperature 0.8, top-p 0.95": (
        Sampling(0.8, top_p=0.95),
        {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95},
    ),
}


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(directory: str) -> None:
    """Prints tokens per second of both and their ratio, for every kind of sampling."""
    model = load_model(directory)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    fast = transformers.AutoTokenizer.from_pretrained(directory)
    texts = read_texts(str(TEXTS)).first(BATCH).texts
    prompts = [fast(" ".join(text.split()[: 1 + i % 7]))["input_ids"] for i, text in enumerate(texts)]
    padded = max(map(len, prompts))
    ids = torch.zeros((BATCH, padded), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, padded - len(prompt) :], mask[row, padded - len(prompt) :] = torch.tensor(prompt), 1
    reference.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=None)

    def theirs(options: dict) -> torch.Tensor:
        with torch.no_grad():
            out = reference.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, **options)
        return out[:, padded:]

    def ours(sampling: Sampling) -> list[list[int]]:
        return generate(model.spec, model.params, prompts, DecodingOptions(NEW, sampling=sampling))

    def with_threads(count: int) -> float:
        torch.set_num_threads(count)
        theirs(SETTINGS["greedy"][1])
        return seconds(lambda: theirs(SETTINGS["greedy"][1]))

    best = min((1, 2), key=with_threads)
    torch.set_num_threads(best)
    print(f"{BATCH} prompts, {NEW} new tokens each, PyTorch with {best} threads (the faster of 1 and 2)")
    if theirs(SETTINGS["greedy"][1]).tolist() != ours(Sampling()):
        sys.exit("greedy texts differ")
    for name, (sampling, options) in SETTINGS.items():
        ours(sampling), theirs(options)
        pairs = [(seconds(lambda s=sampling: ours(s)), seconds(lambda o=options: theirs(o))) for _ in range(REPEATS)]
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        tokens = BATCH * NEW
        print(f"{name}: {tokens / mine:.0f} tokens/s, transformers {tokens / other:.0f}, ratio {ratio:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="directory of a model that transformers loads too")
    with script("sample"):
        main(parser.parse_args().checkpoint)
