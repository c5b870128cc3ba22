"""Tasks of lm-eval on our forward against the harness's own `hf` model, on tasks made of the bundled verses."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from tmjax import cli
from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.evaluate.continuations import Continuation, ContinuationScorer, continuation_sums
from tmjax.evaluate.lm_eval_model import TmjaxLM
from tmjax.evaluate.tasks import load_tasks, run_tasks, task_manager
from tmjax.models.decoder import forward
from tmjax.sharding.mesh import Layout
from tools.verse_tasks import write_choice_task, write_generation_task, write_rolling_task

# Third-party deprecations of the harness, its data library and what they import.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
transformers.utils.logging.disable_progress_bar()
logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four tasks with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    write_choice_task(folder, 200)
    write_choice_task(folder, 200, uneven=True)
    write_rolling_task(folder, 5)
    write_generation_task(folder, 12)
    return folder


def of_hf(directory: Path, names: list[str], folder: Path, batch_size: int) -> dict:
    """Results of the harness's `hf` model."""
    manager = task_manager(names, folder)
    torch.set_num_threads(1)  # more of them wait for each other, beside other tests
    model = HFLM(pretrained=str(directory), batch_size=batch_size, device="cpu", dtype="float32")
    tasks = load_tasks(manager, names, folder)
    return evaluator.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=10)


def numbers(samples: list[dict]) -> np.ndarray:
    """(log-likelihood, is greedy) of every request, in order."""
    return np.concatenate([np.asarray(sample["filtered_resps"], object).reshape(-1, 2) for sample in samples])


@pytest.mark.parametrize(
    ("which", "task", "batch_size"),
    [
        ("llama_dir", "verses_swahili", 32),
        pytest.param("qwen2_dir", "verses_swahili_uneven", 200, marks=pytest.mark.slow),
    ],
)
def test_accuracy_and_log_likelihoods_are_those_of_hf(which, task, batch_size, folder, request):
    """The uneven task in large batches is mostly padding in `hf`: few contexts are long, most have ten tokens."""
    directory = request.getfixturevalue(which)
    ours = run_tasks(TmjaxLM(str(directory), mesh="data=1"), [task], folder=folder)
    theirs = of_hf(directory, [task], folder, batch_size)
    for metric in ("acc", "acc_stderr", "acc_norm"):
        assert ours.results[task][metric] == theirs["results"][task][f"{metric},none"]
    assert [sample["doc_hash"] for sample in ours.samples[task]] == [s["doc_hash"] for s in theirs["samples"][task]]
    mine, other = numbers(ours.samples[task]), numbers(theirs["samples"][task])
    np.testing.assert_allclose(mine[:, 0].astype(float), other[:, 0].astype(float), atol=1e-3, rtol=0)
    assert (mine[:, 1] == other[:, 1]).all()
    assert 0.26 < ours.results[task]["acc"] < 0.9  # the task tells models from guessing


@pytest.mark.slow
def test_rolling_and_written_texts_are_those_of_hf(llama_dir, folder):
    names = ["verses_rolling", "verses_written"]
    ours = run_tasks(TmjaxLM(str(llama_dir), mesh="data=1"), names, folder=folder)
    theirs = of_hf(llama_dir, names, folder, 6)
    mine, other = (
        [s["filtered_resps"][0] for s in found["verses_rolling"]] for found in (ours.samples, theirs["samples"])
    )
    np.testing.assert_allclose(mine, other, rtol=1e-6)
    told = [[s["filtered_resps"] for s in found["verses_written"]] for found in (ours.samples, theirs["samples"])]
    assert told[0] == told[1]
    assert len({text for (text,) in told[0]}) > 6
    assert ours.results["verses_rolling"]["bits_per_byte"] == pytest.approx(
        theirs["results"]["verses_rolling"]["bits_per_byte,none"], rel=1e-6
    )


@pytest.fixture(scope="module")
def asked(qwen2_dir):
    """Requests with shared contexts, one-token continuations, a context twice, one text that is another's beginning."""
    model, generator = load_model(qwen2_dir), np.random.default_rng(0)
    context = generator.integers(0, 2000, 30).tolist()
    wanted = [Continuation((*context, token), 1) for token in (5, 6, 7)]
    wanted += [Continuation((*context[:10], *generator.integers(0, 2000, n).tolist()), n) for n in (1, 3, 9, 120)]
    wanted += [Continuation(tuple(context[:20]), 4), Continuation((*context, 5), 30), wanted[0]]
    return model, wanted


def plain(model, ids) -> np.ndarray:
    """Logits of one text, padded on the right so that all are one program."""
    padded = np.pad(np.asarray(ids), (0, 136 - len(ids)))[None]
    return np.asarray(forward(model.spec, model.params, padded), np.float64)[0, : len(ids)]


def test_sums_are_those_of_the_plain_forward(asked):
    model, wanted = asked
    before = continuation_sums._cache_size()
    sums, greedy = ContinuationScorer(model.spec, model.params, batch_tokens=100)(wanted)
    assert continuation_sums._cache_size() == before + 2  # requests below 128 tokens, and beyond
    for (ids, scored), value, best in zip(wanted, sums, greedy, strict=True):
        logits = plain(model, ids[:-1])[-scored:]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert value == pytest.approx(log_p[np.arange(scored), ids[-scored:]].sum(), abs=1e-4)
        assert best == (logits.argmax(-1) == ids[-scored:]).all()
    likeliest = int(np.argmax(plain(model, wanted[0].ids[:-1])[-1]))
    assert ContinuationScorer(model.spec, model.params)([Continuation((*wanted[0].ids[:-1], likeliest), 1)])[1][0]


def test_a_mesh_gives_the_same(asked, qwen2_dir):
    model, wanted = asked
    layout = Layout("data=2,fsdp=2,tensor=2")
    placed = load_model(qwen2_dir, placement=layout.place)
    many, many_greedy = ContinuationScorer(placed.spec, placed.params, batch_tokens=64, layout=layout)(wanted)
    one, greedy = ContinuationScorer(model.spec, model.params, batch_tokens=64)(wanted)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert (many_greedy == greedy).all()


def test_the_command_logs_what_it_found(qwen2_dir, folder, tmp_path, capsys):
    command = ["evaluate", str(qwen2_dir), "--tasks", "verses_swahili,verses_written", "--tasks-dir", str(folder)]
    out = tmp_path / "out"
    assert (
        cli.run([*command, "--limit", "9", "--num-fewshot", "0", "--json", "--out", str(out), "--mesh", "data=1"]) == 0
    )
    result = json.loads(capsys.readouterr().out)["tasks"][str(qwen2_dir)]
    assert result["documents"] == {"verses_swahili": 9, "verses_written": 9}
    scores = result["results"]["verses_swahili"]
    assert 0 <= scores["acc"] <= 1 and scores["acc_stderr"] > 0
    lines = [json.loads(line) for line in (out / "samples/verses_swahili.jsonl").read_text().splitlines()]
    assert [line["acc"] for line in lines] == [
        float(np.argmax([float(r[0][0]) for r in line["resps"]]) == line["doc"]["gold"]) for line in lines
    ]
    assert np.mean([line["acc"] for line in lines]) == scores["acc"]
    held = json.loads((out / "results.json").read_text())
    assert held["tasks"]["results"] == result["results"]
    assert cli.run([*command, "--out", str(out)]) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give --texts FILE, --tasks NAMES or both"),
        (["--tasks", "verses_swahili", "--tasks-dir", "nowhere"], "nowhere is not a directory"),
        (["--tasks", "verses_swahili", "--chat-template"], "has no chat template"),
        (["--tasks", "broken"], "cannot load task broken"),
    ],
)
def test_what_cannot_be_asked_is_one_line(options, told, qwen2_dir, folder, tmp_path, capsys):
    for file in folder.glob("verses_swahili.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "verses_swahili.yaml").read_text()
    (tmp_path / "broken.yaml").write_text(
        text.replace("task: verses_swahili", "task: broken").replace("verses_swahili.jsonl", "gone.jsonl")
    )
    where = [] if "--tasks-dir" in options else ["--tasks-dir", str(tmp_path)]
    assert cli.run(["evaluate", str(qwen2_dir), *options, *where, "--mesh", "data=1"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tmjax: error:")]
    assert len(error) == 1 and told in error[0]


def test_an_unknown_task_is_named_with_those_like_it(folder):
    with pytest.raises(InputError, match=r"not a task of lm-eval .*global_mmlu_xx.*perhaps .*global_mmlu"):
        task_manager(["verses_swahili", "global_mmlu_xx"], folder)


def test_conversations_are_those_of_the_tokenizer(qwen2_dir, folder):
    model = TmjaxLM(str(qwen2_dir), mesh="data=1")
    each = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    model.tokenizer.chat_template = each + "{% if add_generation_prompt %}<assistant>{% endif %}"
    found = run_tasks(model, ["verses_swahili"], folder=folder, limit=3, num_fewshot=0, chat_template=True)
    contexts = [sample["arguments"][0][0] for sample in found.samples["verses_swahili"]]
    queries = [sample["doc"]["query"] for sample in found.samples["verses_swahili"]]
    assert contexts == [f"<user>{query}\n<assistant>" for query in queries]


def test_lengths_and_settings_that_do_not_fit_are_refused(qwen2_dir):
    from lm_eval.api.instance import Instance

    model = TmjaxLM(str(qwen2_dir), mesh="data=1", max_length=16)
    assert model.max_length == 16

    def request(kind: str, *arguments) -> Instance:
        return Instance(kind, {}, arguments, 0)

    with pytest.raises(InputError, match="tokens, the model takes 16"):
        model.loglikelihood([request("loglikelihood", "a", " neno" * 60)], disable_tqdm=True)
    with pytest.raises(InputError, match="asks for 20 new tokens"):
        model.generate_until([request("generate_until", "a", {"max_gen_toks": 20})])
    with pytest.raises(InputError, match="num_beams=4"):
        model.generate_until([request("generate_until", "a", {"max_gen_toks": 2, "num_beams": 4})])
    short = request("loglikelihood", "na " * 40, " mungu")
    with torch.no_grad():
        cut = HFLM(pretrained=str(qwen2_dir), device="cpu", dtype="float32", max_length=16).loglikelihood([short], True)
    assert model.loglikelihood([short], disable_tqdm=True)[0][0] == pytest.approx(cut[0][0], abs=1e-4)


def test_a_folder_of_tasks_may_be_named_from_here(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    names = ["verses_swahili"]
    (task,) = load_tasks(task_manager(names, folder.name), names, folder.name)
    assert len(list(task.test_docs())) == 200
