"""Description of a mixture of experts (`Experts`), and the runs of layers of one kind that a decoder scans."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Experts:
    """Experts in place of the MLP: how a router chooses `chosen` of `count` for a token, and how wide they are.

    The router's logits become scores by a `softmax` over all experts or a `sigmoid` of each. The largest scores are
    chosen; with `choice_bias` a learned bias is added to the scores for the choice alone. With `groups` > 1 experts lie
    in groups of equal size, and only the `chosen_groups` whose `group_best` largest scores sum to most are open.
    The scores of the chosen experts, divided by their sum if `normalised` and multiplied by `scale`, weigh the experts'
    outputs. An expert every token passes through, of `shared_width` units (0: none), is added; with `shared_gate` times
    the sigmoid of a learned product. Layers in `dense` have an MLP of `DecoderSpec.mlp` units and no experts.

    With `logit_bias` the router's logits have a bias, with `bias` the experts' projections have. With `limit` a unit is
    (u + 1) g sigmoid(`gain` g), g = min(gate, limit) and u = up cut at +-limit (gpt-oss).
    """

    count: int
    chosen: int
    width: int
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0
    choice_bias: bool = False
    groups: int = 1
    chosen_groups: int = 1
    group_best: int = 2
    shared_width: int = 0
    shared_gate: bool = False
    dense: tuple[int, ...] = ()
    logit_bias: bool = False
    bias: bool = False
    limit: float | None = None
    gain: float = 1.0


class Run(NamedTuple):
    """Layers `start` to `stop` of one kind; `first` counts the layers of that kind before them."""

    start: int
    stop: int
    sparse: bool
    first: int


def layers_of(kind: Literal["all", "dense", "sparse"], layers: int, experts: Experts | None) -> tuple[int, ...]:
    """Numbers of the layers of a kind; without experts all are dense."""
    dense = range(layers) if experts is None else experts.dense
    keep = {"all": lambda _: True, "dense": lambda n: n in dense, "sparse": lambda n: n not in dense}[kind]
    return tuple(number for number in range(layers) if keep(number))


def runs_of(layers: int, experts: Experts | None) -> tuple[Run, ...]:
    """Consecutive layers of one kind, in order."""
    sparse = set(layers_of("sparse", layers, experts))
    runs: list[Run] = []
    seen = {True: 0, False: 0}
    for number in range(layers):
        kind = number in sparse
        if runs and runs[-1].sparse == kind:
            runs[-1] = runs[-1]._replace(stop=number + 1)
        else:
            runs.append(Run(number, number + 1, kind, seen[kind]))
        seen[kind] += 1
    return tuple(runs)
