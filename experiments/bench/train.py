"""Training throughput against transformers + PyTorch: same model, same batches, one process, interleaved.

    python experiments/bench/train.py [--model DIR] [--texts FILE] [--tokens 2048] [--rounds 7]

One step is forward, backward, clipping and AdamW in float32 on this machine's cores. Every round times one pass over
the same batches with each side, in turn; printed are the medians over rounds and their ratio. Of times on the clock and
of processor time: on a machine that others use, run it on one core (`taskset -c 0`) and read the latter. `--whole` adds
what a plain jitted JAX step with whole logits takes.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.model import Model
from tmjax.models.decoder import forward
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.train.data import Batch, Batches
from tmjax.train.optimizer import TrainConfig
from tmjax.train.step import Objective, State, start, step

SWAHILI = Path(__file__).resolve().parents[1] / "swahili"
RATE = 1e-4


def ours(model: Model, batches: Sequence[Batch], unroll: int) -> Callable[[], float]:
    """One pass over the batches with `tmjax.adapt`."""
    objective = Objective(model.spec, TrainConfig(steps=10**6, lr=RATE, warmup=0, unroll=unroll))
    held: list[State] = [
        start(objective, {path: jnp.array(value, jnp.float32) for path, value in model.params.items()})
    ]

    def run() -> float:
        for batch in batches:
            held[0], losses = step(objective, held[0], {}, [batch], RATE)
        return float(losses.text)

    return run


def whole_logits(model: Model, batches: Sequence[Batch]) -> Callable[[], float]:
    """One pass with the plainest JAX: whole logits, optax's own AdamW."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, 0.9, 0.95, weight_decay=0.1))

    @jax.jit
    def update(params: dict, state: optax.OptState, batch: Batch) -> tuple:
        def loss(params: dict) -> jax.Array:
            logits = forward(model.spec, params, batch.ids_bt)
            found = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets_bt)
            return jnp.sum(found * batch.mask_bt) / jnp.sum(batch.mask_bt)

        value, gradient = jax.value_and_grad(loss)(params)
        moved, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, moved), state, value

    params = {path: jnp.array(value, jnp.float32) for path, value in model.params.items()}
    held = [(params, optimizer.init(params))]

    def run() -> float:
        for batch in batches:
            params, state, value = update(*held[0], batch)
            held[0] = (params, state)
        return float(value)

    return run


def pytorch(directory: Path, batches: Sequence[Batch]) -> Callable[[], float]:
    """One pass with transformers and PyTorch's fused AdamW."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    made = [[torch.from_numpy(np.array(part)) for part in batch[:3]] for batch in batches]

    def run() -> float:
        for ids, targets, mask in made:
            logits = model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[mask > 0], targets[mask > 0].long())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    return run


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SWAHILI / "target")
    parser.add_argument("--texts", type=Path, default=SWAHILI / "texts/swahili.calibration.jsonl")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch, padding included")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", type=int, default=4, help="row lengths")
    parser.add_argument("--unroll", type=int, default=4, help="layers in one turn of the loop (training.unroll)")
    parser.add_argument("--whole", action="store_true")
    told = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, tokenizer = load_model(told.model), load_tokenizer(told.model)
    documents = [tokenizer.document(item.ids) for item in tokenizer.encode(read_texts(str(told.texts)).texts)]
    made = Batches(documents, tokens=told.tokens, seed=0, lengths=told.lengths)
    batches = list(itertools.islice(made, told.batches))
    counted = sum(int(batch.mask_bt.sum()) for batch in batches)
    padded = sum(batch.mask_bt.size for batch in batches)
    sides = {"tmjax": ours(model, batches, told.unroll), "transformers + PyTorch": pytorch(told.model, batches)}
    if told.whole:
        sides["plain JAX"] = whole_logits(model, batches)
    for run in sides.values():
        run()  # compiles
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(told.rounds):
        for name, run in sides.items():
            begin = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    print(
        f"{told.model.name}: {model.size / 1e6:.1f}M parameters, {len(batches)} batches of up to {told.tokens} tokens, "
        f"{1 - counted / padded:.0%} padding, {len(os.sched_getaffinity(0))} cores, {told.rounds} rounds"
    )
    print("| | tokens/s | PyTorch's time / its time | the same, processor time |\n|---|---|---|---|")
    clock, processor = (
        {name: statistics.median(pair[i] for pair in pairs) for name, pairs in seconds.items()} for i in (0, 1)
    )
    other = "transformers + PyTorch"
    for name in sides:
        ratios = f"{clock[other] / clock[name]:.2f} | {processor[other] / processor[name]:.2f}"
        print(f"| {name} | {counted / clock[name]:,.0f} | {ratios} |")


if __name__ == "__main__":
    main()
