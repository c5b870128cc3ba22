"""What every operator of this folder does alike: all arms with the same trials on `valid`, measured once on `test`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tmjax.commands.merge.inputs import Inputs
from tmjax.evaluate.bits import Scores
from tmjax.typing import Params

#: From what is tried (values by name) to parameters.
Fused = Callable[..., Params]


def compare(
    inputs: Inputs,
    arms: Mapping[str, Callable[[], Fused]],
    tried: Sequence[Mapping[str, float]],
    progress: Callable[[str], None],
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Scores on `test`, and what was chosen, by arm; an arm that betters nothing on `valid` is the target as it is."""
    target, source = inputs.target, inputs.source
    test = inputs.scorer(target, inputs.target_tokenizer, inputs.test)
    scores = {
        "target": test(target.params),
        "source": inputs.scorer(source, inputs.source_tokenizer, inputs.test)(source.params),
    }
    unchanged = inputs.valid_scorer(target.params).bits_per_byte
    chosen: dict[str, Any] = {}
    for arm, make in arms.items():
        fused = make()
        losses = [inputs.valid_scorer(fused(**values)).bits_per_byte for values in tried]
        loss, at = min((loss, number) for number, loss in enumerate(losses))
        better = loss < unchanged
        chosen[arm] = {**(tried[at] if better else {}), "valid_bits_per_byte": min(loss, unchanged)}
        scores[arm] = test(fused(**tried[at])) if better else scores["target"]
        progress(f"{arm}: {chosen[arm]}")
    return scores, chosen
