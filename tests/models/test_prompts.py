"""Prompts with a common beginning: it is read once, and the states after the prompts are those of whole prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmjax.checkpoints.load import load_model
from tmjax.models import generate
from tmjax.models.generate import DecodingOptions
from tmjax.models.prompts import make_prompts, placed, read_prompts
from tmjax.models.sample import Sampling
from tmjax.sharding.mesh import Layout
from tools.family_cases import VOCAB, make_reference

#: Windows and soft caps, two rotary embeddings, learned positions, a mixture of windows and none.
CASES = ("gemma2-capped", "gemma3_text-linear", "gpt2-inverse", "cohere2-layer_types")


def grouped(vocab: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of three groups with beginnings of 40, 21 and 0 tokens, in no order."""
    rng = np.random.default_rng(2)
    begun = [rng.integers(1, vocab, length).tolist() for length in (40, 21, 0)]
    groups = [0, 1, 0, 2, 1, 0]
    own = [rng.integers(1, vocab, length).tolist() for length in (3, 1, 19, 5, 2, 1)]
    return [begun[group] + rest for group, rest in zip(groups, own, strict=True)], groups


@pytest.mark.parametrize("name", CASES)
def test_states_after_prompts_are_those_of_whole_prompts(name, tmp_path) -> None:
    make_reference(name, tmp_path)
    model = load_model(tmp_path)
    rows, groups = grouped(VOCAB)
    read = jax.jit(read_prompts, static_argnums=(0, 3, 4))
    states = []
    for each in (None, groups):
        prompts = make_prompts(model.spec, rows, each, size=8, tokens=16)
        assert (prompts.beginnings is None) == (each is None)
        last, cache = read(model.spec, model.params, prompts, jnp.float32, None)
        assert prompts.slots == cache.keys.shape[3]
        np.testing.assert_array_equal(cache.length[:6], [len(row) for row in rows])
        states.append(np.asarray(last)[:6])
    assert prompts.beginnings.ids.shape == (3, 48) and prompts.ids.shape == (8, 32)
    np.testing.assert_allclose(states[1], states[0], atol=2e-5 * np.abs(states[0]).max())


@pytest.mark.parametrize("mesh", [None, pytest.param("data=2,fsdp=2", marks=pytest.mark.slow)])
def test_generated_tokens_do_not_depend_on_groups(llama_dir, mesh) -> None:
    layout = Layout(mesh)
    model = load_model(llama_dir, placement=layout.place)
    rows, groups = grouped(model.spec.vocab)
    options = DecodingOptions(40, sampling=Sampling(0.8), seed=5, rows=8)
    told = [
        generate.generate(model.spec, model.params, rows, options, groups=each, layout=layout)
        for each in (None, groups)
    ]
    assert told[0] == told[1] and {len(ids) for ids in told[0]} == {40}


def test_frequencies_that_depend_on_the_length_read_every_prompt_whole(tmp_path) -> None:
    make_reference("llama-dynamic", tmp_path)
    rows, groups = grouped(VOCAB)
    assert make_prompts(load_model(tmp_path).spec, rows, groups, size=6, tokens=16).beginnings is None


def test_short_beginnings_are_not_worth_a_pass(llama_dir) -> None:
    spec = load_model(llama_dir).spec
    assert make_prompts(spec, [[1, 2, 3], [1, 2, 4]], [0, 0], size=2, tokens=1).beginnings is None


def test_every_row_of_a_group_has_a_token_of_its_own(llama_dir) -> None:
    spec = load_model(llama_dir).spec
    same = list(range(1, 31))
    prompts = make_prompts(spec, [same, same], [7, 7], size=4, tokens=16, multiple=4)
    assert prompts.count.tolist() == [1, 1, 1, 1] and prompts.beginnings.count.tolist() == [29, 1, 1, 1]
    whole = placed(prompts, lambda x: x + 0, lambda tables: None)
    assert whole.tables is None and whole.beginnings.tables is None
