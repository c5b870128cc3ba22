"""Writing with a cache against transformers' `generate`; draws against the distribution they are from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.helpers import SPEC
from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.models import generate
from tmjax.models.cache import empty_cache, extend, prompt_tables, step_tables
from tmjax.models.decoder import bind, forward, init_params
from tmjax.models.generate import DecodingOptions
from tmjax.models.sample import Sampling, choose, kept_weights
from tmjax.sharding.mesh import Layout
from tools.family_cases import CASES, TOLERANCE, VOCAB, deviation, make_reference

transformers.utils.logging.disable_progress_bar()
#: Prompts before, across and beyond every window and context length that a case rescales for; new tokens for each.
PROMPTS = (3, 70, 118)
NEW = 40
#: Together: windows, soft caps, sinks, ALiBi, experts, learned positions, post norms, and scalings.
QUICK = (
    "llama-dynamic",
    "gemma2-capped",
    "gpt2-inverse",
    "phi3-long",
    "bloom-plain",
    "gpt_oss-mixed",
)


def prompts(vocab: int, lengths=PROMPTS) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(1, vocab, length).tolist() for length in lengths]


class Forced(transformers.LogitsProcessor):
    """Makes `generate` write the tokens that it is told."""

    def __init__(self, tokens: list[int], start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[ids.shape[1] - self.start]] = 0
        return forced


def forced_logits(reference, ids: list[int], after: list[int]) -> np.ndarray:
    """Raw logits [len(after), vocab] of transformers' `generate` while it writes `after`."""
    reference.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([ids]),
            max_new_tokens=len(after),
            do_sample=False,
            logits_processor=[Forced(after, len(ids))],
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.cat(out.logits).numpy()


def cached_logits(spec, params, asked: list[list[int]], after: list[list[int]]) -> np.ndarray:
    """Logits [B, new, vocab] through our cache: the prompts as one padded batch, then token by token."""
    lengths, padded = [len(ids) for ids in asked], max(map(len, asked)) + 3
    ids = np.zeros((len(asked), padded), np.int32)
    for row, prompt in enumerate(asked):
        ids[row, : len(prompt)] = prompt
    read = jax.jit(extend, static_argnames="spec")
    cache = empty_cache(spec, len(asked), padded + len(after[0]))
    count = jnp.asarray(lengths, jnp.int32)
    hidden, cache = read(spec, params, cache, ids, count, prompt_tables(spec, lengths, padded))
    states = [hidden[jnp.arange(len(asked)), count - 1]]
    tables = step_tables(spec, padded + len(after[0]))
    for token in np.asarray(after, np.int32).T[:-1]:
        at = tuple(table[:, np.asarray(cache.length)][:, :, None] for table in tables)
        hidden, cache = read(spec, params, cache, token[:, None], jnp.ones_like(count), at)
        states.append(hidden[:, 0])
    return np.asarray(bind(spec, params).logits(jnp.stack(states, axis=1)))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_logits_through_the_cache_are_those_of_transformers(name, tmp_path):
    reference = make_reference(name, tmp_path)
    model = load_model(tmp_path)
    # A run that outgrows longrope's short factors is read anew by `write`, not by the cache.
    grown = model.spec.rotary.scaling == "longrope"
    asked, after = prompts(VOCAB, (3, 70, 140) if grown else PROMPTS), prompts(VOCAB, (NEW,) * len(PROMPTS))
    with jax.numpy_dtype_promotion("strict"):
        ours = cached_logits(model.spec, model.params, asked, after)
    for row, (ids, told) in enumerate(zip(asked, after, strict=True)):
        assert deviation(ours[row], forced_logits(reference, ids, told)) < TOLERANCE


def generated(
    spec, params, asked, new_tokens, *, numbers=None, layout=None, finished=lambda row, ids: False, **options
) -> list[list[int]]:
    options = DecodingOptions(new_tokens, **options)
    return generate.generate(spec, params, asked, options, numbers=numbers, layout=layout, finished=finished)


def greedy(reference, ids: list[int], new: int) -> list[int]:
    """What transformers writes after one prompt."""
    reference.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        out = reference.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("which", ["llama_dir", "qwen2_dir", "stories_dir"])
def test_bundled_checkpoints(which, request):
    directory = request.getfixturevalue(which)
    model = load_model(directory)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    asked = prompts(model.spec.vocab, (1, 9, 40))
    assert generated(model.spec, model.params, asked, 50, prompt_tokens=48, rows=5) == [
        greedy(reference, ids, 50) for ids in asked
    ]


def test_longrope_is_read_anew_where_its_frequencies_change(tmp_path):
    reference = make_reference("phi3-long", tmp_path)
    model = load_model(tmp_path)
    asked = prompts(VOCAB, (80, 100, 118, 128, 129))
    told = []
    ours = generated(model.spec, model.params, asked, NEW, finished=lambda row, ids: told.append((row, list(ids))))
    assert ours == [greedy(reference, ids, NEW) for ids in asked]
    # Whoever watches sees one text grow.
    assert all(ours[row][: len(ids)] == ids for row, ids in told)
    assert max(len(ids) for row, ids in told if row == 3) == NEW


@pytest.fixture(scope="module")
def tiny():
    return SPEC, init_params(SPEC, jax.random.key(0))


def test_a_prompt_read_in_parts_gives_the_logits_of_the_whole(tiny):
    spec, params = dataclasses.replace(tiny[0], windows=(5, 64, 9)), tiny[1]
    ids = jnp.asarray(prompts(spec.vocab, (24, 24)))
    whole = forward(spec, params, ids)
    cos, sin = (jnp.asarray(table) for table in prompt_tables(spec, [24, 24], 24))
    cache = empty_cache(spec, 2, 40)
    # Rows take the text in parts of different lengths, some of them padding.
    taken, logits = np.zeros(2, int), [[], []]
    for counts in ((3, 16), (7, 2), (14, 6)):
        part, tables = np.zeros((2, max(counts)), np.int32), []
        for row, count in enumerate(counts):
            part[row, :count] = ids[row, taken[row] : taken[row] + count]
        at = np.minimum(taken[:, None] + np.arange(max(counts)), 23)
        tables = tuple(table[:, 0][:, at] for table in (cos, sin))
        hidden, cache = extend(spec, params, cache, jnp.asarray(part), jnp.asarray(counts), tables)
        for row, count in enumerate(counts):
            logits[row].append(bind(spec, params).logits(hidden[row, :count]))
        taken += counts
    assert cache.length.tolist() == [24, 24]
    np.testing.assert_allclose(np.stack([np.concatenate(row) for row in logits]), whole, atol=2e-6)


def test_rows_end_at_an_end_token_or_where_the_caller_says(tiny, monkeypatch):
    spec, params = tiny
    monkeypatch.setattr(generate, "STRETCH", 4)
    asked = prompts(spec.vocab, (4, 5, 6))
    free = generated(spec, params, asked, 12)
    end = free[0][5]
    ended = generated(spec, params, asked, 12, ends=[end])
    assert ended == [ids[: ids.index(end)] if end in ids else ids for ids in free]
    stopped = generated(spec, params, asked, 12, finished=lambda row, ids: row == 1 and len(ids) >= 2)
    assert [stopped[0], stopped[2]] == [free[0], free[2]]
    assert stopped[1] == free[1][:5]  # the first token and a stretch


def test_no_new_compilation_for_texts_of_the_same_padded_shape(tiny):
    spec, params = tiny
    generated(spec, params, prompts(spec.vocab, (4, 5)), 20, prompt_tokens=16, rows=4)
    before = generate.begin._cache_size(), generate.go_on._cache_size()
    generated(spec, params, prompts(spec.vocab, (2, 3, 7)), 25, prompt_tokens=16, rows=4)
    assert (generate.begin._cache_size(), generate.go_on._cache_size()) == before


@pytest.mark.slow
def test_draws_do_not_depend_on_the_batch_or_the_mesh(llama_dir):
    layout = Layout("data=2,fsdp=2")
    model, sampling = load_model(llama_dir), Sampling(0.9, top_p=0.9)
    asked = prompts(model.spec.vocab, (4, 5, 6, 7, 8))
    together = generated(model.spec, model.params, asked, 20, sampling=sampling, seed=3)
    alone = generated(model.spec, model.params, [asked[3]], 20, sampling=sampling, seed=3, numbers=[3])
    assert together[3] == alone[0]
    placed = load_model(llama_dir, placement=layout.place)
    assert generated(placed.spec, placed.params, asked, 20, sampling=sampling, seed=3, layout=layout) == together
    assert generated(model.spec, model.params, asked, 20, sampling=sampling, seed=4) != together


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(1.3, top_k=7), Sampling(1.0, top_p=0.6), Sampling(0.8, top_k=20, top_p=0.9)],
)
def test_kept_tokens_and_their_probabilities_are_those_of_transformers(sampling):
    logits = np.random.default_rng(0).normal(0, 2, (20, 301)).astype(np.float32)
    expected = torch.from_numpy(logits) / sampling.temperature
    if sampling.top_k:
        expected = transformers.TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p:
        expected = transformers.TopPLogitsWarper(sampling.top_p)(None, expected)
    weights = np.asarray(kept_weights(jnp.asarray(logits), sampling))
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), expected.softmax(-1).numpy(), atol=1e-6)


def test_draws_follow_the_distribution():
    logits = jnp.asarray([0.0, 1.0, -1.0, 2.0, -jnp.inf, 0.5])
    sampling, draws = Sampling(0.8, top_k=4), 20000
    keys = jax.random.split(jax.random.key(0), draws)
    drawn = np.bincount(choose(jnp.broadcast_to(logits, (draws, 6)), keys, sampling), minlength=6)
    weights = np.asarray(kept_weights(logits[None], sampling))[0]
    expected = draws * weights / weights.sum()
    assert drawn[expected == 0].sum() == 0
    kept = expected > 0
    assert ((drawn - expected)[kept] ** 2 / expected[kept]).sum() < 16.3  # chi squared, 3 degrees: p = 0.001


def test_what_cannot_be_written_is_refused(tiny):
    spec, params = tiny
    with pytest.raises(InputError, match="at least one token"):
        generated(spec, params, [[1], []], 4)
    with pytest.raises(InputError, match="64 positions"):
        generated(dataclasses.replace(spec, learned_positions=True), params, [[1] * 60], 5)
    with pytest.raises(InputError, match="temperature"):
        Sampling(-1.0)
    with pytest.raises(InputError, match="top_p"):
        Sampling(1.0, top_p=0.0)
