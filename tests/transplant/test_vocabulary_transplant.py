"""`tmjax vocabulary`: tokenizers of several kinds, each as the old one and as the new one."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers import edit_config, read_config, stored
from tokenizer_kinds import KINDS, write

from tmjax import cli
from tmjax.checkpoints.load import load_model
from tmjax.commands.vocabulary_transplant import VocabularyRequest, new_vocabulary
from tmjax.errors import InputError
from tmjax.models.decoder import forward
from tmjax.text.tokenizer import load_tokenizer, shared_tokens
from tmjax.transplant.initialisers import INITIALISERS
from tools.make_checkpoint import family_spec, make_checkpoint

SIZE, ROWS = 500, 512
SCRIPTS = {"latin": "abdefghikmnostuwyz", "cyrillic": "абвгдежзиклмнопрст", "arabic": "ابتجحدرسعفقكلمنهوي"}
SCRIPTS["devanagari"] = "कखगघचजटडतदनपबमयरलवसह"
PAIRS = [(a, b) for a in ("llama2", "gpt2", "unigram") for b in ("llama2", "gpt2", "unigram") if a != b]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """1,000 documents, a quarter in each of four scripts; words come again and again."""
    generator = np.random.default_rng(0)
    words = {
        name: ["".join(generator.choice(list(letters), generator.integers(2, 8))) for _ in range(60)]
        for name, letters in SCRIPTS.items()
    }
    return [" ".join(generator.choice(words[name], 12)) for _ in range(250) for name in SCRIPTS]


@pytest.fixture(scope="module")
def model_of(documents, tmp_path_factory):
    """Makes a random model with a tokenizer of a kind, padded to ROWS, once."""
    made: dict = {}

    def make(kind: str, tied: bool = True, family: str = "qwen3"):
        if (kind, tied, family) not in made:
            folder = tmp_path_factory.mktemp(kind)
            (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
            write(folder, KINDS[kind](documents, SIZE))
            spec = {"vocab": ROWS, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "max_positions": 128}
            spec |= {"hidden": 16, "mlp": 32, "tied_embeddings": tied}
            place = tmp_path_factory.mktemp("models") / f"{family}-{kind}"
            made[kind, tied, family] = make_checkpoint(
                place, family, family_spec(family, **spec), tokenizer=folder, scale=0.3, seed=0
            )
        return made[kind, tied, family]

    return make


def logits(directory, ids) -> np.ndarray:
    model = load_model(str(directory))
    return np.asarray(forward(model.spec, model.params, jnp.asarray([ids])))[0]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_another_tokenizer(old, new, model_of, documents, tmp_path) -> None:
    """Rows and logits of shared tokens are the same bits; transformers writes and reads every document with the new."""
    target, out = model_of(old, tied=old == "gpt2"), tmp_path / "out"
    facts = new_vocabulary(VocabularyRequest(str(target), str(model_of(new)), multiple=64), out)
    rows = facts["rows"]
    assert rows % 64 == 0 and 0 <= rows - load_tokenizer(out).size < 64 and facts["kept"] > 20 and not facts["notes"]
    before, after = load_tokenizer(target), load_tokenizer(out)
    own, theirs = (np.array(ids) for ids in shared_tokens(after, before))
    assert len(own) == facts["kept"]
    tables = [
        {name: value for name, value in stored(place).items() if "embed" in name or "head" in name}
        for place in (target, out)
    ]
    assert tables[0].keys() == tables[1].keys() and len(tables[0]) == (1 if old == "gpt2" else 2)
    for name in tables[0]:
        was, now = (np.frombuffer(each[name][2], np.uint8).reshape(each[name][1][0], -1) for each in tables)
        assert np.array_equal(now[own], was[theirs])
    sequence = np.random.default_rng(0).integers(len(own), size=20)
    assert np.array_equal(logits(out, own[sequence])[:, own], logits(target, theirs[sequence])[:, theirs])
    auto = transformers.AutoTokenizer.from_pretrained(out)
    written = auto(documents, add_special_tokens=False)["input_ids"]
    assert written == [encoding.ids for encoding in after.encode(documents)]
    assert (
        auto.batch_decode(written, clean_up_tokenization_spaces=False) == documents
        or [text.strip() for text in auto.batch_decode(written)] == documents
    )
    config = read_config(out)
    assert config["vocab_size"] == rows and (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("name", INITIALISERS)
def test_every_initialiser_writes_a_model_that_transformers_loads(name, model_of, documents, tmp_path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(documents[:200]) + "\n")
    for number, change in enumerate(({"tokenizer": str(model_of("gpt2"))}, {"add": 40})):
        out = tmp_path / str(number)
        request = VocabularyRequest(
            str(model_of("llama2", tied=False)), texts=str(texts), init=name, source=str(model_of("gpt2")), **change
        )
        facts = new_vocabulary(request, out)
        assert facts["new"] >= 40 and facts["tokens_per_byte"] < 1
        if "add" in change:
            assert facts["kept"] == ROWS - 12 and facts["rows"] == SIZE + 40
            assert facts["tokens_per_byte"] < facts["tokens_per_byte_before"]
        ids = load_tokenizer(out).encode(documents[:1])[0].ids
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        import torch

        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(logits(out, ids), expected, atol=2e-4)


def test_initialisers_differ_and_know_the_source(model_of, documents, tmp_path) -> None:
    """Where the source is the model itself with the new tokens known, its rows come back through the map."""
    big = model_of("gpt2")
    request = {"tokenizer": str(big), "source": str(big), "texts": None}
    rows = {}
    for name in ("mean", "source", "pursuit"):
        new_vocabulary(VocabularyRequest(str(model_of("llama2")), init=name, **request), tmp_path / name)
        rows[name] = np.asarray(load_model(str(tmp_path / name)).params["embed.weight"])
    assert all(np.isfinite(table).all() for table in rows.values())
    assert not np.allclose(rows["mean"], rows["source"]) and not np.allclose(rows["mean"], rows["pursuit"])


def test_ids_and_templates_follow(model_of, documents, tmp_path) -> None:
    """Special tokens of config and generation config get their new ids; a template goes with the tokens it names."""
    old = tmp_path / "old"
    new_vocabulary(VocabularyRequest(str(model_of("llama2")), str(model_of("added"))), old)
    holder = load_tokenizer(old)
    assert holder.size > len(holder.vocabulary.text)  # holes
    user = holder.backend.token_to_id("<|user|>")
    edit_config(old, eos_token_id=[2, user])
    (old / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, user], "pad_token_id": user}))
    (old / "chat_template.jinja").write_text("<|user|>{{ messages[0].content }}")
    out = tmp_path / "gpt2"
    facts = new_vocabulary(VocabularyRequest(str(old), str(model_of("gpt2"))), out)
    assert any("<|user|>" in note for note in facts["notes"]) and not (out / "chat_template.jinja").exists()
    assert read_config(out)["eos_token_id"] == [2]
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2]}
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(documents) + "\n")
    more = tmp_path / "more"
    new_vocabulary(VocabularyRequest(str(old), add=20, texts=str(texts)), more)
    assert (more / "chat_template.jinja").is_file() and read_config(more)["eos_token_id"] == [2, user]
    assert load_tokenizer(more).backend.token_to_id("<|user|>") == user


def test_a_class_that_overrides_the_tokenizer_is_named(model_of, tmp_path) -> None:
    """For qwen2 transformers takes a byte-level class, whatever the files say; the class of the note is right."""
    out = tmp_path / "out"
    request = VocabularyRequest(str(model_of("gpt2", family="qwen2")), str(model_of("llama2")))
    (note,) = new_vocabulary(request, out)["notes"]
    assert "PreTrainedTokenizerFast.from_pretrained" in note
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    auto = transformers.AutoTokenizer.from_pretrained(out)
    ids = load_tokenizer(out).encode(["owdmohn siwdns"])[0].ids
    assert fast("owdmohn siwdns", add_special_tokens=False)["input_ids"] == ids
    assert auto("owdmohn siwdns", add_special_tokens=False)["input_ids"] != ids


def test_the_command_line(model_of, documents, tmp_path, capsys) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(documents) + "\n")
    target, out = str(model_of("llama2")), str(tmp_path / "out")
    assert cli.run(["vocabulary", target, out, "--add", "30", "--texts", str(texts), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 530 and facts["new"] == 30 and facts["tokens_per_byte"] < facts["tokens_per_byte_before"]
    assert cli.run(["evaluate", target, out, "--texts", str(texts), "--json"]) == 0
    bits = [each["bits_per_byte"] for each in json.loads(capsys.readouterr().out)["evaluation"].values()]
    assert all(np.isfinite(bits))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "either --tokenizer, the new vocabulary, or --add"),
        (["--add", "3", "--tokenizer", "{gpt2}"], "either --tokenizer, the new vocabulary, or --add"),
        (["--add", "3"], "--add needs --texts"),
        (["--tokenizer", "{gpt2}", "--init", "similar"], "--init similar needs --texts"),
        (["--tokenizer", "{gpt2}", "--init", "pursuit"], "--init pursuit needs --source"),
        (
            ["--tokenizer", "{gpt2}", "--init", "magic"],
            "'magic' is not known; write mean, pursuit, similar, source",
        ),
        (["--tokenizer", "{empty}"], "has no usable tokenizer"),
        (["--tokenizer", "nowhere"], "no checkpoint at nowhere"),
        (["--tokenizer", "{beyond}"], "has no end-of-sequence token"),
    ],
)
def test_errors_are_one_line(options, line, model_of, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    beyond = tmp_path / "beyond"
    beyond.mkdir()
    write(beyond, json.loads((model_of("gpt2") / "tokenizer.json").read_text()), eos_token=None, bos_token=None)
    places = {"gpt2": model_of("gpt2"), "empty": tmp_path / "empty", "beyond": beyond}
    given = [option.format(**places) for option in options]
    assert cli.run(["vocabulary", str(model_of("llama2")), str(tmp_path / "out"), *given]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error and not (tmp_path / "out").exists()


def test_an_output_is_never_replaced_unasked(model_of, tmp_path) -> None:
    request = VocabularyRequest(str(model_of("llama2")), str(model_of("gpt2")))
    new_vocabulary(request, tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        new_vocabulary(request, tmp_path / "out")
    new_vocabulary(request, tmp_path / "out", overwrite=True)
    with pytest.raises(InputError, match="is the output; choose another output"):
        new_vocabulary(request, model_of("llama2"), overwrite=True)


def test_a_target_that_is_read_as_a_source_alone_is_refused(model_of, tmp_path, capsys) -> None:
    """Of a multimodal model the vision tensors would be lost, and the text model's config is not the outer one."""
    wrapped = tmp_path / "wrapped"
    shutil.copytree(model_of("gpt2", family="qwen2"), wrapped)
    inner = read_config(wrapped)
    (wrapped / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": inner}))
    given = ["vocabulary", str(wrapped), str(tmp_path / "out"), "--tokenizer", str(model_of("llama2"))]
    assert cli.run(given) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "multimodal llava" in error and not (tmp_path / "out").exists()


def test_an_interrupted_transplant_leaves_nothing(model_of, tmp_path, capsys, monkeypatch) -> None:
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tmjax.checkpoints.hf.write_weights", stop)
    given = ["vocabulary", str(model_of("gpt2")), str(tmp_path / "out"), "--tokenizer", str(model_of("llama2"))]
    assert cli.run(given) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())
