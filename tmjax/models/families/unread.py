"""Config keys that no family field takes: sorted into refused, noted and ignored keys.

A key could change the forward pass if transformers' code for the family reads it, or the code that all models share. A
key that neither reads changes nothing in transformers, so it is only noted. `known_keys.json` lists the keys that are
read; `python -m tools.config_keys` writes it from the installed transformers, and a test compares the two.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

KNOWN_KEYS = Path(__file__).with_name("known_keys.json")

#: Keys that say nothing about the forward pass of a dense text decoder at inference, and that most checkpoints hold.
#: Reviewed; add with care. They are neither refused nor noted.
IGNORED = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version use_cache attention_dropout initializer_range
    initializer_factor init_std dropout layerdrop hidden_dropout activation_dropout embed_dropout resid_dropout
    classifier_dropout resid_pdrop embd_pdrop attn_pdrop residual_dropout embedding_dropout bos_token_id
    eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id pretraining_tp _name_or_path
    name_or_path _commit_hash _attn_implementation_autoset _attn_implementation attn_implementation
    _attn_implementation_internal _experts_implementation _experts_implementation_internal unsloth_version
    unsloth_fixed is_decoder chunk_size_feed_forward gradient_checkpointing output_attentions _output_attentions
    output_hidden_states return_dict return_dict_in_generate output_scores id2label label2id num_labels problem_type
    task_specific_params tokenizer_class prefix finetuning_task is_llama_config transformers.js_config summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout tie_last_hidden_states
    token_classification_bias num_heads embed_dim
    """.split()  # noqa: SIM905
)


def _is(value: object) -> Callable[[Any], bool]:
    return lambda given: type(given) is type(value) and given == value


#: Keys that transformers reads and that change nothing while their value is this.
NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "add_cross_attention": _is(False),
    "is_causal": _is(True),
    "is_encoder_decoder": _is(False),
    "layer_types": lambda kinds: isinstance(kinds, list) and set(map(str, kinds)) <= {"full_attention"},
    "partial_rotary_factor": lambda value: value == 1,
    "per_layer_config": lambda value: value == {},
    "reorder_and_upcast_attn": lambda value: isinstance(value, bool),  # changes where rounding happens
    "use_bidirectional_attention": _is(False),
}
#: Keys that repeat a field of the spec, in families that spell it otherwise or derive it.
REPEATED: Mapping[str, str] = {
    "head_dim": "head_dim",
    "hidden_size": "hidden",
    "max_position_embeddings": "max_positions",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
    "num_key_value_heads": "kv_heads",
}
#: Keys that some other implementation computes with, and their meaning; transformers ignores them.
REMARKS: Mapping[str, str] = {
    "auto_map": "names code that came with the checkpoint; that code is never run",
    "dual_chunk_attention_config": "asks for attention in chunks over very long contexts",
    "full_attn_mod": "sets which layers have no window in the checkpoint's own code",
    "interpolate_factor": "stretches positions in the checkpoint's own code",
    "num_nextn_predict_layers": "counts layers that predict further tokens",
    "rope_interleaved": "says that neighbouring dimensions rotate together",
    "use_dynamic_ntk": "changes theta with the length of a text in the checkpoint's own code",
    "use_logn_attn": "scales scores with the length of a text in the checkpoint's own code",
    "use_mrope": "asks for rotary positions of several axes",
}
_PART_OF_A_FORWARD = re.compile(r"rope|rotary|scal|mask|window|attn|attention|expert|quant|cap|multipl|bias|norm|mlp")


@functools.cache
def known_keys() -> Mapping[str, Any]:
    """The table that `tools/config_keys.py` writes."""
    return json.loads(KNOWN_KEYS.read_text(encoding="utf-8"))


def could_matter(model_type: str, keys: Collection[str]) -> set[str]:
    """Those of the keys that transformers' code for a family reads, or the code that all models share.

    All of them for a family that is not in the table yet.
    """
    known = known_keys()
    if model_type not in known["families"]:
        return set(keys)
    return set(keys) & {*known["shared"], *known["families"][model_type]["read"]}


def known_rope_keys() -> frozenset[str]:
    """Keys of a dictionary of rotary settings that some kind of scaling reads."""
    return frozenset(known_keys()["rope"])


def sort_unread(model_type: str, unread: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Sorts the keys that no field takes.

    Args:
        model_type: Family of the config.
        unread: Those keys with their values; none of them null.
        values: Fields of the spec by attribute.

    Returns:
        Keys that could change the forward pass, and notes on those that change nothing.
    """

    def harmless(key: str, value: Any) -> bool:
        if key in NEUTRAL and NEUTRAL[key](value):
            return True
        return key in IGNORED or (key in REPEATED and values.get(REPEATED[key]) == value)

    left = {key: value for key, value in unread.items() if not harmless(key, value)}
    refused = could_matter(model_type, left)
    return sorted(refused), _notes(model_type, {key: left[key] for key in sorted(left.keys() - refused)})


def _notes(model_type: str, idle: Mapping[str, Any]) -> list[str]:
    off = {key for key, value in idle.items() if value in (False, {}, [])}
    remarked = [key for key in idle if key in REMARKS and key not in off]
    notes = [
        f"config.json: {key} {REMARKS[key]}; transformers ignores it for {model_type}, and so does tmjax"
        for key in remarked
    ]
    rest = [key for key in idle if key not in remarked]
    if rest:
        notes.append(
            f"config.json: without effect, since transformers' {model_type} does not read it either: {', '.join(rest)}"
        )
    named = [key for key in rest if key not in off and _PART_OF_A_FORWARD.search(key) and "flash" not in key]
    if named:
        notes.append(
            f"config.json: if the checkpoint was trained with other code, check what it does with {', '.join(named)}"
        )
    return notes
