"""Tasks on our forward against lm-eval's own `hf` model: the same requests, in turn, in one process, warm.

    python experiments/bench/tasks.py experiments/swahili/source

200 questions of four choices made of the bundled verses (`tools/verse_tasks.py`), asked without and with padding-heavy
contexts. `hf` gets the batch size and the threads that it is fastest with. Ratios are medians over the repeats.
"""

import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tmjax.evaluate.lm_eval_model import TmjaxLM
from tmjax.evaluate.tasks import load_tasks, task_manager
from tools.verse_tasks import write_choice_task

REPEATS = 5
#: Requests by which the batch size and threads of `hf` are chosen.
TRIED = 256
BATCHES, THREADS = (16, 64), (1, 2)


def requests_of(name: str, folder: Path) -> list[Instance]:
    """What the harness asks for a task."""
    (task,) = load_tasks(task_manager([name], folder), [name], folder)
    task.build_all_requests(rank=0, world_size=1)
    return task.instances


def seconds(model: HFLM | TmjaxLM, asked: list[Instance]) -> float:
    """Wall-clock time of answering all requests."""
    started = time.perf_counter()
    model.loglikelihood(asked, disable_tqdm=True)
    return time.perf_counter() - started


def main(directory: str) -> None:
    """Prints requests per second of both and their ratio, for both tasks."""
    logging.disable(logging.WARNING)
    ours = TmjaxLM(directory)
    with tempfile.TemporaryDirectory() as folder:
        names = [write_choice_task(Path(folder), 200, uneven=uneven) for uneven in (False, True)]
        asked = {name: requests_of(name, Path(folder)) for name in names}
    for name, requests in asked.items():
        tried = {}
        for threads in THREADS:
            torch.set_num_threads(threads)
            for batch in BATCHES:
                theirs = HFLM(pretrained=directory, batch_size=batch, device="cpu", dtype="float32")
                theirs.loglikelihood(requests[:batch], disable_tqdm=True)
                tried[threads, batch] = seconds(theirs, requests[:TRIED])
        threads, batch = min(tried, key=tried.get)
        torch.set_num_threads(threads)
        theirs = HFLM(pretrained=directory, batch_size=batch, device="cpu", dtype="float32")
        mine, other = (model.loglikelihood(requests, disable_tqdm=True) for model in (ours, theirs))
        worst = np.abs(np.asarray(mine)[:, 0] - np.asarray(other)[:, 0]).max()
        pairs = [(seconds(ours, requests), seconds(theirs, requests)) for _ in range(REPEATS)]
        rates = [len(requests) / statistics.median(column) for column in zip(*pairs, strict=True)]
        ratio = statistics.median(b / a for a, b in pairs)
        print(
            f"{name}: {rates[0]:.0f} requests/s, hf {rates[1]:.0f} (batches of {batch}, {threads} threads),"
            f" ratio {ratio:.2f}, largest difference {worst:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1])
