"""Our forward as a model of EleutherAI's lm-evaluation-harness (`lm-eval`), registered under the name `tmjax`.

Token ids are those of the harness's own `hf` model: the tokenizer's special tokens unless a text begins with BOS, the
context's ids cut off the whole's, BOS (or EOS) before texts without context, the left of what is too long dropped.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tmjax.checkpoints.description import describe
from tmjax.checkpoints.hub import read_json
from tmjax.checkpoints.load import config_directory, load_model
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.evaluate.continuations import Continuation, ContinuationScorer
from tmjax.models.generate import DecodingOptions, generate
from tmjax.models.sample import Sampling
from tmjax.sharding.mesh import AUTO, Layout
from tmjax.text.buckets import bucketed
from tmjax.text.tokenizer import load_tokenizer
from tmjax.text.unknown import hidden_bytes, hidden_nats

#: Settings of generation that mean nothing beside those read here, with the values that they may have.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1, 1.0),
    "num_return_sequences": (1,),
    "use_cache": (True, False),
    "min_p": (None, 0, 0.0),
    "max_length": (None,),
}


@register_model("tmjax")
class TmjaxLM(TemplateLM):
    """A checkpoint (directory, hub id or loaded `Model`) behind the harness's interface."""

    def __init__(
        self,
        pretrained: str | Model,
        *,
        mesh: str | None = None,
        layout: Layout | None = None,
        name: str | None = None,
        dtype: str = "float32",
        batch_tokens: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        # More parameters than elsewhere: lm-eval makes a model from the `key=value` pairs of `--model_args`, each of
        # them a parameter. The last three it always passes itself: tokens, not requests, make a batch.
        super().__init__()
        if isinstance(pretrained, Model):
            # Its parameters lie where the caller put them.
            self.model, self.layout = pretrained, layout or Layout()
        else:
            self.layout = layout or Layout(mesh or AUTO, [describe(config_directory(pretrained)).spec.hidden])
            self.model = load_model(pretrained, placement=self.layout.place)
        self.name = name or str(self.model.directory)
        self.dtype, self.seed = jnp.dtype(dtype), seed
        spec = self.model.spec
        self.max_length = int(max_length or spec.max_positions)
        if spec.bound and self.max_length > spec.max_positions:
            raise InputError(f"max_length is {max_length}, {spec.bound}; lower it")
        text_tokenizer = load_tokenizer(self.model.directory, spec.vocab)
        self._written = text_tokenizer.known(spec.vocab)
        self.tokenizer, self._prefix, self._texts = text_tokenizer.fast, text_tokenizer.prefix, text_tokenizer
        tokens = int(batch_tokens) if batch_tokens else None
        self.scorer = ContinuationScorer(
            spec, self.model.params, batch_tokens=tokens, dtype=self.dtype, layout=self.layout
        )
        self._known: dict[str, list[int]] = {}
        self._tokens = hashlib.sha256()

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context: BOS, or EOS if there is no BOS."""
        return self._prefix

    @property
    def max_gen_toks(self) -> int:
        """Number of new tokens if a task gives none."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    @property
    def tokens_sha256(self) -> str:
        """Hash of all token ids scored so far, in order: equal for two models with the same requests."""
        return self._tokens.hexdigest()

    def get_model_info(self) -> dict[str, Any]:
        """Returns the facts of the model that the harness writes beside its results."""
        return {"model_num_parameters": self.model.size, "model_dtype": str(self.dtype), "model_name": self.name}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Applies the tokenizer's chat template to a conversation; drops the system role if the template has none."""
        from jinja2.exceptions import TemplateError

        def apply(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return apply(chat_history)
        except TemplateError:
            return apply([message for message in chat_history if message["role"] != "system"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of one text."""
        if add_special_tokens is None and string in self._known:
            return self._known[string]
        return self._encode([string], add_special_tokens)[0]

    @functools.cached_property
    def _bos_text(self) -> str:
        return self.tokenizer.decode(self.prefix_token_id)

    def _encode(self, texts: Sequence[str], special: bool | None) -> list[list[int]]:
        """Encodes many texts; with `special` None as the tokenizer is configured, but never with two BOS."""
        plain = [special is False or (special is None and text.startswith(self._bos_text)) for text in texts]
        result: list[list[int]] = [[] for _ in texts]
        for bare in (False, True):
            chosen = [i for i, is_bare in enumerate(plain) if is_bare == bare]
            if chosen:
                out = self.tokenizer([texts[i] for i in chosen], add_special_tokens=not bare, verbose=False)
                for i, ids in zip(chosen, out["input_ids"], strict=True):
                    result[i] = ids
        return result

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Computes the log-likelihood of each continuation, and whether greedy decoding gives it."""
        texts: dict[str, None] = {}
        for context, continuation in (request.args for request in requests):
            if context:
                texts |= {context.rstrip() or context: None, context + continuation: None}
        # All texts are encoded together, on all cores; the harness then requests them one by one.
        self._known = dict(zip(texts, self._encode(list(texts), None), strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._known = {}

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        continuations = []
        for (_context, continuation), context_ids, ids in requests:
            if not ids or len(ids) > self.max_length:
                size = "no token" if not ids else f"{len(ids)} tokens, the model takes {self.max_length}"
                raise InputError(f"the continuation {continuation[:60]!r} has {size}")
            whole = (*context_ids, *ids)[-(self.max_length + 1) :]
            # If a continuation fills the window, its first token has no context to be predicted from.
            continuations.append(Continuation(whole, min(len(ids), len(whole) - 1)))
        for ids, scored in continuations:
            self._tokens.update(repr((ids, scored)).encode())
        sums, greedy = self.scorer(continuations)
        # A whole text (without a context) comes in several windows; the caller charges it once.
        charged = self._charge(["" if strings[0] is None else strings[1] for strings, _, _ in requests])
        answers = list(zip((sums - charged).tolist(), greedy.tolist(), strict=True))
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings[0] is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _charge(self, texts: Sequence[str]) -> np.ndarray:
        """Nats that texts are charged for bytes that their tokens hide."""
        if not texts:
            return np.zeros(0)
        return hidden_nats(hidden_bytes(self._texts, texts, self._texts.encode(texts)).unknown)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Computes log-likelihoods of whole texts, in windows of the model's length that score every token once."""
        pieces: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        texts = [request.args[0] for request in requests]
        for number, ids in enumerate(self._encode(texts, None)):
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                pieces.append(((None, texts[number]), context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[number] += value
        totals = (np.asarray(totals) - self._charge(texts)).tolist()
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        """Tokens that end a text: the tokenizer's EOS and the EOS tokens of the checkpoint's generation config."""
        file = self.model.directory / "generation_config.json"
        eos = read_json(file).get("eos_token_id") if file.is_file() else None
        return tuple(sorted({self.eot_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates a text after each context, up to the first stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        result = [""] * len(requests)
        for members in groups.values():
            for number, text in zip(members, self._generate([requests[i].args for i in members], members), strict=True):
                result[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return result

    def _generate(self, asked: Sequence[tuple[str, dict[str, Any]]], numbers: Sequence[int]) -> list[str]:
        """Texts after contexts that share their settings."""
        settings = dict(normalize_gen_kwargs(asked[0][1], self.max_gen_toks))
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(settings.pop("until"), eos=eos)
        new = settings.pop("max_gen_toks")
        sampling = _sampling(settings)
        room = self.max_length - new
        if room < 1:
            raise InputError(f"a task asks for {new} new tokens, the model takes {self.max_length} in all")
        prompts = [ids[-room:] or [self.prefix_token_id] for ids in self._encode([text for text, _ in asked], None)]
        result = [""] * len(asked)

        def text_of(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=True)

        lengths = [len(ids) + new for ids in prompts]
        tokens, multiple = 4 * self.scorer.batch_tokens, self.layout.batch_multiple
        for batch in bucketed(lengths, batch_tokens=tokens, multiple=multiple):
            rows = batch.documents
            options = DecodingOptions(
                new,
                ends=self._ends,
                known=self._written,
                sampling=sampling,
                seed=self.seed,
                prompt_tokens=batch.tokens - new,
                rows=batch.size,
                dtype=self.dtype,
            )
            generated = generate(
                self.model.spec,
                self.model.params,
                [prompts[row] for row in rows],
                options,
                numbers=[numbers[row] for row in rows],
                layout=self.layout,
                finished=lambda _row, ids: any(stop and stop in text_of(ids) for stop in until),
            )
            for row, ids in zip(rows, generated, strict=True):
                result[row] = postprocess_generated_text(text_of(ids), stop=until, think_end_token=None)
        return result


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Returns the supported generation settings of a task; raises InputError for others."""
    drawn, temperature = settings.pop("do_sample", False), float(settings.pop("temperature", 0.0) or 0.0)
    top_k, top_p = settings.pop("top_k", None), settings.pop("top_p", None)
    for name, value in settings.items():
        if name not in _NEUTRAL or value not in _NEUTRAL[name]:
            raise InputError(f"a task asks for {name}={value!r} in generation, which is not supported")
    return Sampling(temperature, top_k or None, top_p) if drawn and temperature > 0 else Sampling()
