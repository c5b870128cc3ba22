"""Eight kinds of tokenizers as released models have them, trained on texts by the `tokenizers` library."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

NAMED = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
Kind = Callable[[Sequence[str], int], dict[str, Any]]


def _trained(tokenizer: Tokenizer, trainer: Any, texts: Sequence[str]) -> dict[str, Any]:
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def _byte_level(
    texts: Sequence[str],
    size: int,
    *,
    normalizer: Any = None,
    before: Sequence[Any] = (),
    prefix_space: bool = False,
    trim: bool = True,
) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(NAMED), initial_alphabet=alphabet)
    return _trained(tokenizer, trainer, texts)


def gpt2(texts: Sequence[str], size: int) -> dict[str, Any]:
    """Byte-level BPE; offsets are trimmed."""
    return _byte_level(texts, size)


def roberta(texts: Sequence[str], size: int) -> dict[str, Any]:
    """Byte-level BPE that writes a space before every text, and composes characters."""
    return _byte_level(texts, size, normalizer=normalizers.NFC(), prefix_space=True)


def digits(texts: Sequence[str], size: int) -> dict[str, Any]:
    """Byte-level BPE of compatibility-normalised text, every digit by itself."""
    before = [pre_tokenizers.Digits(individual_digits=True)]
    return _byte_level(texts, size, normalizer=normalizers.NFKC(), before=before, trim=False)


def added(texts: Sequence[str], size: int) -> dict[str, Any]:
    """Byte-level BPE with added tokens of every sort, and holes among its ids."""
    found = _byte_level(texts, size - 12)
    for number, (content, flags) in enumerate(
        {
            "<|user|>": {"special": True},
            "model": {"single_word": True},
            "prefix": {"special": True, "single_word": True},
            "    ": {},
            "Yesu": {"normalized": True},
            "<mask>": {"special": True, "lstrip": True},
            "<end>": {"rstrip": True},
        }.items()
    ):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False} | flags
        found["added_tokens"].append({"id": size - 12 + number, "content": content} | flags)
    # Vocabulary entries move up behind a hole.
    vocabulary = found["model"]["vocab"]
    last = [piece for piece, number in vocabulary.items() if number >= size - 17]
    vocabulary |= {piece: vocabulary[piece] + 12 for piece in last}
    for token in found["added_tokens"][len(NAMED) :]:
        vocabulary[token["content"]] = token["id"] = token["id"] - 5
    return found


def _sentencepiece_bpe(texts: Sequence[str], size: int, **parts: Any) -> dict[str, Any]:
    """BPE of characters with byte fallback, whose spaces are written ▁."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*NAMED, *BYTES])
    found = _trained(tokenizer, trainer, texts)
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] in NAMED]
    return found | parts


def llama2(texts: Sequence[str], size: int) -> dict[str, Any]:
    """SentencePiece BPE as Llama 2 has it: ▁ is put before every text by the normaliser."""
    before = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    after = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # The class of the library does not give its settings away but pickles as them.
    parts = {"normalizer": json.loads(before.__getstate__()), "decoder": json.loads(after.__getstate__())}
    return _sentencepiece_bpe(texts, size, pre_tokenizer=None, **parts)


def metaspace(texts: Sequence[str], size: int) -> dict[str, Any]:
    """The same written with Metaspace, before the first word alone."""
    after = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()])
    before = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = {"pre_tokenizer": json.loads(before.__getstate__()), "decoder": json.loads(after.__getstate__())}
    return _sentencepiece_bpe(texts, size, **parts)


def unigram(texts: Sequence[str], size: int) -> dict[str, Any]:
    """SentencePiece Unigram as T5 and XLM-R have it: compatibility-normalised, spaces made one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=list(NAMED), unk_token="<unk>")
    return _trained(tokenizer, trainer, texts)


def wordpiece(texts: Sequence[str], size: int) -> dict[str, Any]:
    """WordPiece as BERT has it: lower case, spaces dropped, ## within words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(NAMED)), texts)


KINDS: dict[str, Kind] = {
    kind.__name__: kind for kind in (gpt2, roberta, digits, added, llama2, metaspace, unigram, wordpiece)
}


def write(directory: Path, state: dict[str, Any], **config: Any) -> Path:
    """Writes tokenizer.json, and a tokenizer_config.json that names the special tokens."""
    (directory / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | config
    named = {key: value for key, value in named.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return directory
