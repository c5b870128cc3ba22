"""Tokenizers of eight kinds: ids, bytes of tokens, readings of texts, what two of them share, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import edit_config
from tokenizer_kinds import KINDS, write
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from tmjax import cli
from tmjax.errors import InputError
from tmjax.teacher.vocabulary_map import Crossing, few_shared, require_shared
from tmjax.text.documents import read_texts
from tmjax.text.reading import BEFORE, WITHIN, read
from tmjax.text.token_map import read_token_map
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer, shared_tokens
from tmjax.text.writing import write_within

SIZE = 600
#: What tokenizers stumble over: other scripts, parts of characters, forms that are normalised, spaces, added tokens.
ODD = (
    "Yesu akawa 12.",
    "中é  x\u0301 model ﬁ<end>  Yesu…  prefix a",
    "<s> a </s>b",
    " lead",
    "tail  \n\nx ",
    "Mimi<mask> ni    Yesu;a\u0300 ΣΑΣ İstanbul 𝔘",
    "<|user|>mimi",
)
#: Kinds whose tokens' bytes are the text's own, where no character is unknown and none is normalised.
EXACT = [kind for kind in KINDS if kind != "wordpiece"]


@pytest.fixture(scope="module")
def verses(repo) -> tuple[str, ...]:
    return read_texts(str(repo / "experiments/swahili/texts/swahili.calibration.jsonl")).first(300).texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory, verses) -> dict[str, Path]:
    found = {}
    for name, kind in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        # A model type for which transformers has a class of its own, of another kind.
        (folder / "config.json").write_text(json.dumps({"model_type": "llama" if kind == KINDS["gpt2"] else "qwen2"}))
        found[name] = write(folder, kind(verses, SIZE))
    return found


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict[str, TextTokenizer]:
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_that_tokenizer_json_says(kind, folders, tokenizers, verses) -> None:
    truth = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    texts = [*ODD, *verses[:50]]
    for text, encoding in zip(texts, tokenizers[kind].encode(texts), strict=True):
        assert encoding.ids == truth.encode(text, add_special_tokens=False).ids
    ids = encoding.ids
    assert tokenizers[kind].decode(ids) == truth.decode(ids)
    assert (tokenizers[kind].prefix, tokenizers[kind].suffix) == (truth.token_to_id("<s>"), truth.token_to_id("</s>"))


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_texts_are_neither_cut_nor_padded(setting, folders, verses, tmp_path) -> None:
    state = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    changed = Tokenizer.from_str(json.dumps(state))
    if setting == "truncation":
        changed.enable_truncation(4)
    else:
        changed.enable_padding(length=400)
    write(tmp_path, json.loads(changed.to_str()))
    truth = load_tokenizer(folders["gpt2"]).encode(verses[:3])
    assert [held.ids for held in load_tokenizer(tmp_path).encode(verses[:3])] == [held.ids for held in truth]


# Bytes.


@pytest.mark.parametrize(
    ("kind", "piece", "text"),
    [
        ("gpt2", "ĠYesu", " Yesu"),
        ("gpt2", "Ã", b"\xc3"),
        ("roberta", "wa", "wa"),
        ("digits", "Ġ", " "),
        ("added", "model", "model"),
        ("added", "    ", "    "),
        ("added", "<end>", "<end>"),
        ("llama2", "▁Yesu", " Yesu"),
        ("llama2", "wa", "wa"),
        ("llama2", "<0x41>", "A"),
        ("llama2", "<0xE4>", b"\xe4"),
        ("metaspace", "▁", " "),
        ("unigram", "▁na", " na"),
        ("wordpiece", "yesu", " yesu"),
        ("wordpiece", "##wa", "wa"),
    ],
)
def test_bytes_of_a_token(kind, piece, text, tokenizers) -> None:
    held = tokenizers[kind]
    assert held.vocabulary.text[held.backend.token_to_id(piece)] == (text if isinstance(text, bytes) else text.encode())


def test_special_tokens_stand_for_no_text(tokenizers) -> None:
    for kind, held in tokenizers.items():
        named = {"<unk>", "<s>", "</s>"} | ({"<|user|>", "prefix", "<mask>"} if kind == "added" else set())
        assert set(held.vocabulary.special.values()) == named
        assert held.vocabulary.unknown in (None, held.backend.token_to_id("<unk>"))
        assert held.special_ids | held.vocabulary.text.keys() == set(held.backend.get_vocab().values())


def test_a_character_is_written_with_its_own_token_not_with_its_byte(tokenizers) -> None:
    held = tokenizers["llama2"]
    for character in "aeinY":
        token = held.backend.token_to_id(character)
        assert held.vocabulary.id_of(character.encode()) == token
        assert held.vocabulary.ids[character.encode()] == (token, held.backend.token_to_id(f"<0x{ord(character):02X}>"))
    assert held.vocabulary.id_of(b"\xe4") == held.backend.token_to_id("<0xE4>")


def test_ids_may_have_holes(tokenizers) -> None:
    held = tokenizers["added"]
    known = held.known(SIZE + 8)
    assert held.size == SIZE > len(held.backend.get_vocab())
    assert set(np.nonzero(known)[0]) == set(held.backend.get_vocab().values())
    assert tokenizers["gpt2"].known(SIZE) is None and tokenizers["gpt2"].known(SIZE + 1).sum() == SIZE


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_reading_are_the_text(kind, tokenizers, verses) -> None:
    held, texts = tokenizers[kind], [*ODD, *verses[:50]]
    readings = [read(text, each, held) for text, each in zip(texts, held.encode(texts), strict=True)]
    for text, reading in zip(texts, readings, strict=True):
        assert b"".join(reading.pieces(text)) == text.encode()
        places = reading.starts[reading.starts != WITHIN]
        assert (np.diff(places) >= 0).all() and places[-1] == len(text.encode()) and places[0] in (0, BEFORE)
        if reading.exact:
            spelt = None if None in reading.strings else b"".join(reading.strings)
            assert spelt in (None, text.encode(), b" " + text.encode())
    exact = np.mean([reading.exact for reading in readings[len(ODD) :]])
    assert exact == 1 if kind in EXACT else exact < 0.1


def test_a_token_that_a_normaliser_made_is_where_its_characters_were(tokenizers) -> None:
    """The ligature is one place, wherever its two letters go; the dots are another."""
    text = "na ﬁwa… na"
    held = tokenizers["digits"]
    reading = read(text, held.encode([text])[0], held)
    assert not reading.exact and b"".join(filter(None, reading.strings)) == b"na fiwa... na"
    whole = text.encode()
    starts = {whole[at:] for at in reading.starts if at >= 0}
    assert b" na" in starts and "… na".encode() in starts and whole[len(b"na ") + 1 :] not in starts
    assert reading.starts.tolist().count(WITHIN) >= 2


# Two vocabularies.


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_reads_itself_as_it_is(kind, tokenizers, verses) -> None:
    held = tokenizers[kind]
    lexicon = read_token_map(held, held, verses[:20], (SIZE, SIZE))
    assert [list(pieces) for pieces in lexicon.pieces] == [[token] for token in lexicon.ids]
    readable = 0
    for string in held.vocabulary.ids:
        readable += string.decode(errors="ignore").encode() == string
    assert len(lexicon.ids) == readable > 250
    assert shared_tokens(held, held) == (sorted(held.backend.get_vocab().values()),) * 2


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", ["gpt2", "llama2", "wordpiece"])
def test_tokens_are_written_with_the_bytes_that_they_stand_for(target, source, tokenizers, verses) -> None:
    """Within a text: `wale` and ` wale` are different tokens, whatever the source does at the beginning of one."""
    own, other = tokenizers[target].vocabulary, tokenizers[source].vocabulary
    alphabet = set("".join(verses).encode())
    strings = [string for string in own.ids if string.isascii() and alphabet.issuperset(string)]
    written = write_within(tokenizers[source], strings)
    both = [(s, b"".join(other.text[i] for i in ids)) for s, ids in zip(strings, written, strict=True) if ids]
    # WordPiece reads lower case, and knows no spaces but those before words and signs.
    spaceless = source == "wordpiece"
    same = [a == b or (spaceless and a.lower().replace(b" ", b"") == b.replace(b" ", b"")) for a, b in both]
    assert len(both) > 0.95 * len(strings) and all(same)
    pairs = dict(zip(strings, written, strict=True))
    begun = [s for s in strings if s[:1] == b" " and s[1:].isalpha() and pairs[s] and pairs.get(s[1:])]
    assert len(begun) > 5 and all(pairs[s] != pairs[s[1:]] for s in begun)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_shared_tokens_have_the_same_bytes(target, source, tokenizers) -> None:
    own, other = tokenizers[target].vocabulary, tokenizers[source].vocabulary
    pairs = dict(zip(*shared_tokens(tokenizers[target], tokenizers[source]), strict=True))
    for a, b in pairs.items():
        assert own.text.get(a) == other.text.get(b) and own.special.get(a) == other.special.get(b)
    assert len(set(pairs.values())) == len(pairs) >= 3
    for character in (b"a", b"i", b"e"):  # with its own token, not with a byte
        a, b = (vocabulary.id_of(character) for vocabulary in (own, other))
        assert a is None or b is None or pairs[a] == b


@pytest.mark.parametrize("source", EXACT)
@pytest.mark.parametrize("target", EXACT)
def test_positions_that_two_kinds_share(target, source, tokenizers, verses) -> None:
    """By brute force: both have read the same characters, and a space before the text is nothing that both read."""
    crossing = Crossing(tokenizers[target], tokenizers[source])
    encodings, readings = crossing.read(verses[:10])
    shares = []
    for text, own, other, *both in zip(verses, *encodings, *readings, strict=False):
        spelt = [
            [b"".join(t.vocabulary.text[i] for i in e.ids[:n]) for n in range(len(e.ids) + 1)]
            for t, e in ((crossing.target, own), (crossing.source, other))
        ]
        lead = [len(prefixes[-1]) - len(text.encode()) for prefixes in spelt]
        truth = [
            [a, b]
            for a, one in enumerate(spelt[0])
            for b, two in enumerate(spelt[1])
            if len(one) - lead[0] == len(two) - lead[1]
        ]
        assert crossing.shared_positions(*both).tolist() == truth
        shares.append(len(truth) / (len(own.ids) + 1))
    assert np.mean(shares) > 0.5


def test_what_a_source_reads_otherwise_is_no_shared_position(tokenizers, verses) -> None:
    text = " ".join([*verses[:5], "na…", *verses[5:20]])
    crossing = Crossing(tokenizers["gpt2"], tokenizers["digits"])
    _, ((own,), (other,)) = crossing.read([text])
    pairs = crossing.shared_positions(own, other)
    at = text.encode().index("…".encode())
    assert at in own.starts and at in other.starts and at not in own.starts[pairs[:, 0]]
    assert len(pairs) > 0.8 * len(own.starts)


@pytest.mark.parametrize(
    ("target", "source"), [("gpt2", "wordpiece"), ("wordpiece", "llama2"), ("llama2", "wordpiece")]
)
def test_a_tokenizer_that_changes_its_texts_is_refused(target, source, tokenizers, verses) -> None:
    with pytest.raises(InputError) as caught:
        require_shared(tokenizers[target], tokenizers[source], verses, otherwise="do otherwise")
    error = str(caught.value)
    assert f"the tokenizer of {tokenizers['wordpiece'].name} reads ' " in error and "\n" not in error
    assert "% of the places where both begin a token" in error and error.endswith("; do otherwise")
    assert require_shared(tokenizers["wordpiece"], tokenizers["wordpiece"], verses, otherwise="")[0] > 1000


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Lowercase(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        normalizers.Replace("w", "v"),
    ],
    ids=["lower case", "accents", "letters"],
)
def test_normalisers_are_refused_where_they_change_the_texts(normalizer, folders, tokenizers, verses, tmp_path) -> None:
    held = Tokenizer.from_file(str(folders["gpt2"] / "tokenizer.json"))
    held.normalizer = normalizer
    changed = load_tokenizer(write(tmp_path, json.loads(held.to_str())))
    accented = tuple(text.replace("a ", "á ") for text in verses)
    for pair in ((changed, tokenizers["llama2"]), (tokenizers["llama2"], changed)):
        with pytest.raises(InputError, match=f"the tokenizer of {tmp_path} reads"):
            require_shared(*pair, accented, otherwise="")
    plain = tuple(text.lower().replace("w", "u") for text in verses)
    assert require_shared(changed, tokenizers["gpt2"], plain, otherwise="")[0] > 1000


def test_words_split_without_a_mark_are_refused(folders, tokenizers, verses, tmp_path) -> None:
    """Whether a space was before a token is nobody's guess."""
    state = json.loads((folders["llama2"] / "tokenizer.json").read_text())
    state |= {"normalizer": None, "pre_tokenizer": json.loads(pre_tokenizers.Whitespace().__getstate__())}
    with pytest.raises(InputError, match="where the text has ' "):
        require_shared(tokenizers["gpt2"], load_tokenizer(write(tmp_path, state)), verses, otherwise="")


def test_few_shared_positions_are_warned_of() -> None:
    assert few_shared(30, 100) is None
    assert few_shared(22, 1798).startswith("only 22 of the target's 1,798 positions (1.2%)")


# Other layouts of released tokenizers.


def _part(part) -> dict:
    """The settings of a normaliser or pre-tokenizer, as tokenizer.json has them."""
    return json.loads(part.__getstate__())


LAYOUTS = {
    # Spaces written as marks by the normaliser, none put before the text.
    "gemma": ("llama2", {"normalizer": _part(normalizers.Replace(" ", "▁"))}, 0),
    # Split at spaces first, every word marked.
    "xlm-r": (
        "unigram",
        {
            "normalizer": _part(normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(left=False)])),
            "pre_tokenizer": _part(
                pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
            ),
        },
        1,
    ),
    # Split by a pattern of its own, then into bytes.
    "llama3": (
        "gpt2",
        {
            "pre_tokenizer": _part(
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(r"\s?\w+|\s?[^\s\w]+|\s+"), "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                )
            )
        },
        0,
    ),
    # Into bytes by the normaliser.
    "bytes": ("gpt2", {"normalizer": _part(normalizers.ByteLevel()), "pre_tokenizer": None}, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_read_as_they_are(layout, folders, tokenizers, verses, tmp_path) -> None:
    base, parts, lead = LAYOUTS[layout]
    held = load_tokenizer(write(tmp_path, json.loads((folders[base] / "tokenizer.json").read_text()) | parts))
    truth = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text, encoding in zip(verses[:40], held.encode(verses[:40]), strict=True):
        assert encoding.ids == truth.encode(text, add_special_tokens=False).ids
        reading = read(text, encoding, held)
        assert b"".join(reading.strings) == b" " * lead + text.encode() and reading.exact
        assert b"".join(reading.pieces(text)) == text.encode()
    lexicon = read_token_map(held, held, verses[:20], (SIZE, SIZE))
    assert [list(pieces) for pieces in lexicon.pieces] == [[token] for token in lexicon.ids] and len(lexicon.ids) > 250
    for pair in ((held, tokenizers["gpt2"]), (tokenizers["llama2"], held)):
        shared, of = require_shared(*pair, verses, otherwise="")
        assert shared > 0.4 * of


# What is refused, in one line.


@pytest.fixture
def pair(tmp_path, qwen2_dir, llama_dir) -> tuple[Path, Path]:
    return shutil.copytree(llama_dir, tmp_path / "source"), shutil.copytree(qwen2_dir, tmp_path / "target")


def _commands(pair, texts, out: Path) -> dict[str, list[str]]:
    both = ["--source", str(pair[0]), "--target", str(pair[1]), "--texts", texts["calibration"]]
    both += ["--valid", texts["valid"], "--out", str(out)]
    return {
        "merge": ["merge", *both],
        "adapt": ["adapt", *both, "--mode", "combined"],
        "sft": ["adapt", *both, "--mode", "sft"],
        "doctor": ["doctor", *both[:6], "--json"],
        "evaluate": ["evaluate", str(pair[1]), "--texts", texts["test"]],
    }


def _refused(capsys, arguments: list[str], *fragments: str) -> None:
    assert cli.run(arguments) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("tmjax: error: ") and all(line.startswith("tmjax: warning: ") for line in warnings)
    for fragment in fragments:
        assert fragment in error
    if "--out" in arguments:
        assert not Path(arguments[arguments.index("--out") + 1]).exists()


FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("command", ["merge", "adapt", "sft", "doctor", "evaluate"])
def test_no_tokenizer_is_an_error(command, pair, texts, tmp_path, capsys) -> None:
    for name in FILES:
        (pair[1] / name).unlink()
    line = f"{pair[1]} has no usable tokenizer: it lacks tokenizer.json; copy the tokenizer's files"
    _refused(capsys, _commands(pair, texts, tmp_path / "out")[command], line)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "qwen.tiktoken"])
def test_a_tokenizer_of_another_kind_alone_says_what_to_do(name, qwen2_dir, tmp_path) -> None:
    folder = shutil.copytree(qwen2_dir, tmp_path / "x")
    (folder / FILES[0]).rename(folder / name)
    with pytest.raises(InputError, match=rf"{name} without tokenizer.json, .*save_pretrained"):
        load_tokenizer(folder)


def test_vocabulary_and_merges_are_enough(qwen2_dir, verses, tmp_path) -> None:
    """As old checkpoints of byte-level families have them; transformers knows how to read those."""
    folder = shutil.copytree(qwen2_dir, tmp_path / "x")
    model = json.loads((folder / FILES[0]).read_text())["model"]
    (folder / FILES[0]).unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    truth = load_tokenizer(qwen2_dir).encode(verses[:20])
    assert [held.ids for held in load_tokenizer(folder).encode(verses[:20])] == [held.ids for held in truth]


@pytest.mark.parametrize(
    ("config", "prefix", "suffix"),
    [
        ({}, "<s>", "</s>"),
        ({"bos_token": None}, "</s>", "</s>"),
        ({"pad_token": "</s>", "unk_token": None}, "<s>", "</s>"),
        ({"bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}}, "<s>", "</s>"),
    ],
    ids=str,
)
def test_documents_begin_and_end_as_the_config_says(config, prefix, suffix, folders, tmp_path) -> None:
    state = json.loads((folders["llama2"] / "tokenizer.json").read_text())
    held = load_tokenizer(write(tmp_path, state, **config))
    named = [held.backend.token_to_id(token) for token in (prefix, suffix)]
    assert held.document([7, 8]) == [named[0], 7, 8, named[1]]


def test_without_an_end_of_sequence_one_line_says_so(folders, tmp_path) -> None:
    state = json.loads((folders["llama2"] / "tokenizer.json").read_text())
    write(tmp_path, state, eos_token=None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    line = r"no end-of-sequence token; set eos_token in tokenizer_config.json \(config.json says 2, which is '</s>'\)"
    for _ in range(2):
        with pytest.raises(InputError, match=line):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    write(tmp_path, state, eos_token="<|nowhere|>")
    with pytest.raises(InputError, match=r"lacks the eos_token '<\|nowhere\|>'"):
        load_tokenizer(tmp_path)


def test_added_tokens_beside_tokenizer_json_keep_their_ids(folders, tmp_path) -> None:
    state = json.loads((folders["llama2"] / "tokenizer.json").read_text())
    told = {str(SIZE): {"content": "<|end|>", "special": True}}
    held = load_tokenizer(write(tmp_path, state, eos_token="<|end|>", added_tokens_decoder=told))
    assert held.suffix == SIZE and held.encode(["na<|end|>"])[0].ids[-1] == SIZE and SIZE in held.special_ids
    write(tmp_path, state, added_tokens_decoder={str(SIZE + 7): {"content": "<|end|>", "special": True}})
    with pytest.raises(InputError, match=f"the id {SIZE}, .* the id {SIZE + 7}; make the files agree"):
        load_tokenizer(tmp_path)
    write(tmp_path, state)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": SIZE}))
    assert load_tokenizer(tmp_path).vocabulary.text[SIZE] == b"<tool>"


def test_an_empty_vocabulary_is_an_error(qwen2_dir, tmp_path) -> None:
    folder = shutil.copytree(qwen2_dir, tmp_path / "x")
    state = json.loads((folder / FILES[0]).read_text())
    state["model"] |= {"vocab": {}, "merges": []}
    (folder / FILES[0]).write_text(json.dumps(state))
    with pytest.raises(InputError, match="no usable tokenizer: its vocabulary is empty"):
        load_tokenizer(folder)


def _with_image(folder: Path) -> int:
    """Adds a token beyond the embedding, as Gemma 3 1B has one."""
    state = json.loads((folder / FILES[0]).read_text())
    number = len(state["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"].append({"id": number, "content": "<image>", "special": True} | flags)
    (folder / FILES[0]).write_text(json.dumps(state))
    return number


def test_a_token_beyond_the_embedding_is_a_note(pair, texts, tmp_path, capsys) -> None:
    assert _with_image(pair[1]) == 2048
    assert cli.run(_commands(pair, texts, tmp_path / "out")["doctor"]) == 0
    report = json.loads(capsys.readouterr().out)
    note = "target: 1 added tokens lie beyond the embedding's 2048 rows, the first is '<image>'"
    assert report["mergeable"] and any(note in line for line in report["notes"])
    assert cli.run(_commands(pair, texts, tmp_path / "out")["evaluate"]) == 0


@pytest.mark.parametrize("command", ["merge", "adapt", "sft", "evaluate", "doctor"])
def test_a_text_with_a_token_beyond_the_embedding_is_refused_alike(command, pair, texts, tmp_path, capsys) -> None:
    _with_image(pair[1])
    held = {name: tmp_path / f"{name}.jsonl" for name in texts}
    for name, file in held.items():
        file.write_text(
            Path(texts[name]).read_text() + json.dumps({"id": "image", "text": "Yesu <image> alikuwa"}) + "\n"
        )
    line = (
        f"the tokenizer of {pair[1]} gives id 2048 (<image>) in the text 'Yesu <image> alikuwa', "
        "but the model's vocabulary has 2048 entries"
    )
    arguments = _commands(pair, {name: str(file) for name, file in held.items()}, tmp_path / "out")[command]
    _refused(capsys, arguments, line)


def test_a_vocabulary_that_is_not_the_models_is_a_problem(pair, texts, tmp_path, capsys) -> None:
    edit_config(pair[1], vocab_size=100)
    assert cli.run(_commands(pair, texts, tmp_path / "out")["doctor"]) == 2
    assert "target: the tokenizer has 2048 tokens, the embedding 100 rows" in capsys.readouterr().out
