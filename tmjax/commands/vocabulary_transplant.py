"""`tmjax vocabulary`: another tokenizer for a model, or more tokens."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tmjax.checkpoints import hf, orbax
from tmjax.checkpoints.formats.writer import DEFAULT_SHARD_SIZE
from tmjax.checkpoints.hub import COMPANIONS, TEMPLATES, extra_templates, resolve
from tmjax.checkpoints.load import require_plain
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.files.atomic import atomic_directory
from tmjax.files.jsonfile import read_json
from tmjax.files.lock import OutputLock
from tmjax.files.owned import refuse_existing
from tmjax.files.paths import refuse_overlap
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import CONFIG_NAME, FAST_NAME, TextTokenizer, load_tokenizer
from tmjax.transplant.correspondence import correspond
from tmjax.transplant.extension import extended
from tmjax.transplant.initialisers import find_initialiser
from tmjax.transplant.initialisers.base import Initialiser, NewTokens
from tmjax.transplant.learning import learn_pieces
from tmjax.transplant.vocabulary_tables import renumbered, source_tables, transplant

GENERATION = "generation_config.json"
#: A template in a file, which transformers reads before the one in the tokenizer's config.
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
#: Below this share of kept tokens a warning is due.
_FEW = 0.05
#: Tokens of a text that is written with two classes of tokenizers.
_PROBE = 100


@dataclass(frozen=True)
class VocabularyRequest:
    """A vocabulary transplant.

    `tokenizer` is a directory or hub id with the new tokenizer; otherwise `add` tokens are learnt from `texts`.
    `init` names the initialiser, `source` another model for those that need one. The number of rows is a multiple of
    `multiple`.
    """

    target: str
    tokenizer: str | None = None
    add: int | None = None
    texts: str | None = None
    init: str = "mean"
    source: str | None = None
    multiple: int = 1


def new_vocabulary(
    request: VocabularyRequest,
    out: str | Path,
    *,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Writes a model with another vocabulary as a Hugging Face checkpoint.

    Args:
        request: Model, new vocabulary and the initialisation of new rows.
        out: Output directory.
        max_shard_size: Largest safetensors file, for example "5GB".
        overwrite: Whether an existing output of tmjax may be replaced.
        warn: Called with a line on what may be unintended.

    Returns:
        Facts for the user: numbers of rows by kind and, with texts, tokens per byte before and after.

    Raises:
        InputError: The request is incomplete, or as `load_model` and `learn_pieces` raise it.
    """
    make, out = check_request(request), Path(out)
    named = {"the target": request.target, "the tokenizer": request.tokenizer, "the source": request.source}
    refuse_overlap(out, [(name, place) for name, place in named.items() if place is not None])
    refuse_existing(out, overwrite=overwrite)
    require_plain(request.target)
    model = _open(request.target)
    old = load_tokenizer(model.directory, model.spec.vocab)
    texts = [] if request.texts is None else list(read_texts(request.texts).texts)
    source = None
    if request.source is not None:
        other = _open(request.source)
        source = source_tables(other, load_tokenizer(other.directory, other.spec.vocab))
    with OutputLock(out), atomic_directory(out, overwrite=overwrite) as partial:
        notes = _tokenizer_files(request, model, old, texts, partial)
        new = load_tokenizer(partial)
        rows = new.size if request.add is None else max(new.size, model.spec.vocab)
        rows = -(-rows // request.multiple) * request.multiple
        new = replace(new, rows=rows, name=request.tokenizer or str(out))
        of_new = correspond(old, new, (model.spec.vocab, rows), same_ids=request.add is not None)
        tokens = NewTokens(old, new, of_new, source, texts)
        kept = int((of_new.kept >= 0).sum())
        if kept < _FEW * rows:
            warn(f"{kept} of {rows} rows are kept; a model that knows so few of its tokens has to be trained")
        result = transplant(model, tokens, make)
        _write(result, tokens, partial, max_shard_size)
        notes += _class_note(partial, new)
        if request.add is not None and len(of_new.new) < request.add:
            notes.append(f"the texts teach {len(of_new.new)} tokens of {request.add}: no other stands in them twice")
    facts = {
        "target": request.target,
        "output": str(out),
        "tokenizer": request.tokenizer,
        "init": request.init,
        "rows_before": model.spec.vocab,
        "rows": rows,
        "kept": kept,
        "new": len(of_new.new),
        "notes": notes,
    }
    return facts | (_compression(old, new, texts) if texts else {})


def check_request(request: VocabularyRequest) -> Initialiser:
    """Returns the initialiser of a request; raises InputError for an incomplete one. No input is read."""
    make = find_initialiser(request.init)
    if (request.tokenizer is None) == (request.add is None):
        raise InputError(
            "give either --tokenizer, the new vocabulary, or --add, how many tokens are learnt from --texts"
        )
    if (request.add is not None or make.needs_texts) and request.texts is None:
        option = "--add" if request.add is not None else f"--init {make.name}"
        raise InputError(f"{option} needs --texts, texts of the language or domain")
    if make.needs_source and request.source is None:
        raise InputError(f"--init {make.name} needs --source, a model that knows the new tokens")
    return make


def _open(name: str) -> Model:
    """Opens a checkpoint without reading its parameters."""
    directory = resolve(name)
    return (orbax if orbax.is_orbax(directory) else hf).open_model(directory)


def _tokenizer_files(
    request: VocabularyRequest, model: Model, old: TextTokenizer, texts: Sequence[str], directory: Path
) -> list[str]:
    """Writes the files of the new tokenizer; returns notes."""
    if request.tokenizer is None:
        assert request.add is not None
        pieces = learn_pieces(old, texts, request.add)
        state = dict(extended(old, pieces))
        # What `load_tokenizer` leaves out, because it trims offsets and adds special tokens.
        state["post_processor"] = _stored_state(model.directory).get("post_processor")
        place = model.directory
    else:
        place = resolve(request.tokenizer, weights=False)
        state = _stored_state(place) or dict(load_tokenizer(place).state)
    (directory / FAST_NAME).write_text(json.dumps(state, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    for name in (*_TEMPLATE_FILES, "special_tokens_map.json", "added_tokens.json"):
        if (place / name).is_file():
            shutil.copyfile(place / name, directory / name)
    for file in extra_templates(place):
        (directory / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, directory / TEMPLATES / file.name)
    config = read_json(place / CONFIG_NAME) if (place / CONFIG_NAME).is_file() else {}
    # A class of the model's type would build another tokenizer out of the vocabulary.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("auto_map", None)
    notes = [] if request.tokenizer is None else _keep_template(model.directory, state, config, directory)
    (directory / CONFIG_NAME).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return notes


def _stored_state(directory: Path) -> dict[str, Any]:
    return read_json(directory / FAST_NAME) if (directory / FAST_NAME).is_file() else {}


def _keep_template(model: Path, state: Mapping[str, Any], config: dict[str, Any], directory: Path) -> list[str]:
    """Keeps the model's chat template where the new tokenizer has none and knows its special tokens."""
    own = read_json(model / CONFIG_NAME) if (model / CONFIG_NAME).is_file() else {}
    files = [model / name for name in _TEMPLATE_FILES if (model / name).is_file()]
    if "chat_template" in config or any((directory / name).is_file() for name in _TEMPLATE_FILES):
        return ["the chat template is the new tokenizer's"] if files or "chat_template" in own else []
    if not files and "chat_template" not in own:
        return []
    text = json.dumps(own.get("chat_template")) + "".join(file.read_text(encoding="utf-8") for file in files)
    known = {token["content"] for token in state.get("added_tokens") or []}
    special = {token["content"] for token in _stored_state(model).get("added_tokens") or [] if token["special"]}
    lost = sorted(name for name in special - known if name in text)
    if lost:
        return [f"the chat template is left out: the new tokenizer lacks {', '.join(lost)}"]
    for file in files:
        shutil.copyfile(file, directory / file.name)
    if "chat_template" in own:
        config["chat_template"] = own["chat_template"]
    return []


def _write(model: Model, tokens: NewTokens, directory: Path, max_shard_size: str) -> None:
    """Writes weights, configs and companions; the tokenizer's files are there already."""
    names = {FAST_NAME, CONFIG_NAME, GENERATION, *_TEMPLATE_FILES, "special_tokens_map.json", "added_tokens.json"}
    others = [name for name in COMPANIONS if "process" in name and name not in names]
    for name in others:
        if (model.directory / name).is_file():
            shutil.copyfile(model.directory / name, directory / name)
    if (model.directory / GENERATION).is_file():
        config = renumbered(read_json(model.directory / GENERATION), tokens)
        (directory / GENERATION).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    hf.write_weights(model, directory, max_shard_size=max_shard_size)


def _class_note(directory: Path, new: TextTokenizer) -> list[str]:
    """A note where transformers' AutoTokenizer does not read the new tokenizer as its `tokenizer.json` says.

    For some types of models it takes the class of the type, which builds another tokenizer out of the vocabulary.
    """
    from transformers import AutoTokenizer

    strings = [text.decode(errors="ignore") for text in new.vocabulary.text.values()]
    probes = [" ".join(strings[first : first + _PROBE]) for first in range(0, len(strings), _PROBE)]
    advice = "load it with transformers.PreTrainedTokenizerFast.from_pretrained"
    try:
        auto = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        ids = auto(probes, add_special_tokens=False)["input_ids"]
    except Exception as error:  # a class that cannot read the vocabulary raises anything
        return [f"AutoTokenizer of transformers cannot read this tokenizer ({type(error).__name__}); {advice}"]
    if ids == [encoding.ids for encoding in new.encode(probes)]:
        return []
    return [
        "AutoTokenizer of transformers builds another tokenizer for this type of model than tokenizer.json says; "
        f"{advice}"
    ]


def _compression(old: TextTokenizer, new: TextTokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Tokens per byte of the texts before and after."""
    size = max(1, sum(len(text.encode()) for text in texts))
    before, after = (sum(len(each.ids) for each in tokenizer.encode(texts)) / size for tokenizer in (old, new))
    return {"tokens_per_byte_before": before, "tokens_per_byte": after}
