"""Texts read as lines after examples: rows, positions, ends, and the stage that decides on them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_kinds

from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.models.decoder import init_params
from tmjax.runs.directory import RunDirectory
from tmjax.runs.manifest import Manifest
from tmjax.teacher.edges import MARGIN, measure_edges
from tmjax.teacher.lines import Examples, as_line, line_ends, read_lines
from tmjax.teacher.probabilities import Search
from tmjax.teacher.shared import probabilities_of_texts, read_shared
from tmjax.teacher.stages import TeacherStages
from tmjax.teacher.teacher_model import Teacher
from tmjax.teacher.vocabulary_map import Crossing
from tmjax.text.tokenizer import load_tokenizer
from tools.make_checkpoint import family_spec


@pytest.fixture(scope="module")
def verses(repo) -> tuple[str, ...]:
    lines = (repo / "experiments/swahili/texts/swahili.calibration.jsonl").read_text().splitlines()
    return tuple(json.loads(line)["text"] for line in lines[:30])


@pytest.fixture(scope="module")
def source(llama_dir) -> Teacher:
    return Teacher.of(load_model(llama_dir))


@pytest.fixture(scope="module")
def target(qwen2_dir) -> Teacher:
    return Teacher.of(load_model(qwen2_dir))


def test_examples_are_other_given_texts_on_a_line_each(verses) -> None:
    examples = Examples(("two\n lines", *verses), 3, seed=1)
    drawn = [examples.drawn(number) for number in range(8)]
    assert len(set(map(tuple, drawn))) == 8 and drawn == [examples.drawn(number) for number in range(8)]
    for lines in drawn:
        assert len(set(lines)) == 3 and set(lines) <= {"two lines", *verses}
    few = dataclasses.replace(examples, given=("a", "b  c", "d"))
    assert sorted(few.drawn(0, without=("b c",))) == ["a", "d"]
    assert dataclasses.replace(examples, count=0).drawn(0) == []


def test_a_row_is_texts_after_examples_and_places_are_where_both_have_read_the_same(source, target, verses) -> None:
    examples, texts = Examples(verses[20:], 2, seed=0), [*verses[:9], verses[25]]
    shared = read_shared(source, target.tokenizer, texts, max_tokens=400, examples=examples)
    plain = read_shared(source, target.tokenizer, texts, max_tokens=400)
    assert 1 < len(shared.source) < len(texts) == len(plain.source)
    tokenizer, seen = source.tokenizer, []
    for ids, pairs in zip(shared.source, shared.pairs, strict=True):
        assert ids[0] == tokenizer.prefix and len(ids) <= 400
        for number, position in pairs.tolist():
            text, place = shared.places[number].tolist()
            read = tokenizer.decode(ids[1 : position + 1])
            *before, own = read.split("\n")
            assert texts[text].startswith(own.lstrip() if place == 0 else own)
            assert len(target.tokenizer.encode([own])[0].ids) in range(place, place + 2)
            assert texts[text] not in before and set(before[:2]) <= {as_line(t) for t in examples.given}
            seen.append((text, place))
    assert seen == [tuple(pair) for pair in shared.places.tolist()] == sorted(set(seen))
    # A line may begin and end with other tokens than a text; the rest is shared as without examples.
    assert len(set(map(tuple, plain.places.tolist())) ^ set(seen)) <= 2 * len(texts)


def test_a_long_text_is_not_cut_for_examples(source, target, verses) -> None:
    """As many of its positions are read as without examples, of which only as many stand before it as there is room."""
    texts = [" ".join(verses[:3]), verses[4]]
    long = max(len(encoding.ids) for encoding in source.tokenizer.encode(texts))
    examples = Examples((" ".join(verses[10:13]), *verses[13:16]), 3, seed=0)
    for room in (long + 2, long + 40):
        both = [read_shared(source, target.tokenizer, texts, max_tokens=room, examples=e) for e in (None, examples)]
        plain, lines = (set(map(tuple, each.places.tolist())) for each in both)
        assert len(plain - lines) <= 2 and max(map(len, both[1].source)) <= room


def test_no_row_is_longer_than_allowed_and_a_long_text_is_cut(source, target, verses) -> None:
    texts = [" ".join(verses[:8]), verses[9]]
    shared = read_shared(source, target.tokenizer, texts, max_tokens=96, examples=Examples(verses[10:12], 1, seed=0))
    assert [len(ids) for ids in shared.source] == [96, 96] or max(map(len, shared.source)) <= 96
    assert all(pairs[:, 1].max() < 96 for pairs in shared.pairs) and {0, 1} == set(shared.places[:, 0].tolist())


def test_the_end_of_a_line_is_the_targets_end(source, target, verses) -> None:
    ends = line_ends(source.tokenizer)
    crossing = Crossing(target.tokenizer, source.tokenizer, ends)
    assert ends and set(crossing.tokens(b"", np.asarray(ends)).tolist()) == {target.tokenizer.suffix}
    assert not crossing.readings(b"").is_open[ends].any()
    plain = Crossing(target.tokenizer, source.tokenizer)
    assert target.tokenizer.suffix not in plain.tokens(b"", np.asarray(ends)).tolist()
    found, facts = probabilities_of_texts(
        source, target.tokenizer, verses[:3], max_tokens=256, examples=Examples(verses[5:], 2, seed=0)
    )
    documents = [target.tokenizer.document(encoding.ids) for encoding in target.tokenizer.encode(verses[:3])]
    assert facts["positions"] == len(found.document) and 0 < facts["mass"] <= 1
    assert np.all(np.diff(found.document) >= 0) and max(found.position) <= max(map(len, documents)) - 2


def test_a_tokenizer_without_line_breaks_reads_no_lines(source, target, verses, tmp_path) -> None:
    tokenizer_kinds.write(tmp_path, tokenizer_kinds.KINDS["wordpiece"](list(verses), 300))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    crossing = Crossing(target.tokenizer, load_tokenizer(tmp_path))
    with pytest.raises(InputError, match="drops line breaks"):
        read_lines(crossing, verses[:1], [], Examples(verses, 1, 0), max_tokens=64)


def _stages(path, warned: list[str]) -> TeacherStages:
    header = Manifest(tmjax="0", seed=0, inputs={}, key={}, mesh={}, devices=1, processes=1, platform="cpu", teacher={})
    run = RunDirectory.start(path, "", header, overwrite=False)
    return TeacherStages(run, lambda stage: lambda done, total: None, warned.append)


@pytest.mark.parametrize(
    ("given", "lines", "count"),
    [
        (None, True, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, False, 0), (2, True, 2))),
        ("broken", False, 3),
    ],
)
def test_a_source_with_another_convention_reads_examples_first(
    source, target, verses, tmp_path, given, lines, count
) -> None:
    """Its end-of-sequence token is one that it never learnt to put after such texts."""
    never = next(n for n, piece in source.tokenizer.vocabulary.text.items() if piece and len(piece) > 6)
    other = dataclasses.replace(source, tokenizer=dataclasses.replace(source.tokenizer, suffix=never))
    texts = ("one\ntwo", *verses[:12]) if given == "broken" else verses[:12]
    warned: list[str] = []
    stages = _stages(tmp_path / "run", warned)
    examples = Examples(texts, None if given == "broken" else given, seed=0)
    try:
        edges = stages.edges(["key"], lambda: (other, target), examples, max_tokens=256)
        facts = stages.run.manifest.edges
    finally:
        stages.run.close()
    assert (edges.lines, edges.examples) == (lines, count) and not facts["end"].used
    after = measure_edges(
        other, target, texts, max_tokens=256, search=Search(), examples=Examples(texts, count, seed=0)
    )
    if not lines:
        assert not edges.end and set(facts) == {"first", "end"} and "ends texts unlike" in warned[0]
        return
    assert {f"{edge} after examples" for edge in after} == set(facts) - {"first", "end"}
    assert edges.end == after["end"].used == (after["end"].source <= after["end"].target + MARGIN)
    assert all(line.startswith(f"after {count} given texts the source") for line in warned)


def test_a_source_is_not_read_beyond_the_positions_that_it_learned(llama_dir, qwen2_dir, verses) -> None:
    """What a longer table holds behind them changes nothing, and no continuation needs it."""
    spec = family_spec("gpt2", vocab=4096, hidden=32, layers=2, heads=4, mlp=64, max_positions=20)
    tokenizers = load_tokenizer(llama_dir), load_tokenizer(qwen2_dir)
    params = init_params(spec, jax.random.key(0))
    beyond = 9 * jax.random.normal(jax.random.key(1), (60, spec.hidden))
    longer = params | {"positions.weight": jnp.concatenate([params["positions.weight"], beyond])}
    teachers = [
        Teacher(each, held, tokenizers[0])
        for each, held in ((spec, params), (dataclasses.replace(spec, max_positions=80), longer))
    ]
    short, whole = (
        probabilities_of_texts(teacher, tokenizers[1], verses[:4], max_tokens=64)[0] for teacher in teachers
    )
    places = [list(zip(each.document.tolist(), each.position.tolist(), strict=True)) for each in (short, whole)]
    assert len(places[0]) < len(places[1])
    same = [places[1].index(place) for place in places[0]]
    np.testing.assert_array_equal(short.ids[:, 0], whole.ids[same, 0])
    np.testing.assert_allclose(short.weight, whole.weight[same], atol=1e-6)
