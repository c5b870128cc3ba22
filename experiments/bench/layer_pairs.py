"""What leaving pairs of layers unsolved costs: the share of the layer plan that is lost, as reported and as it is.

    python experiments/bench/layer_pairs.py runs/swahili experiments/swahili/target

The first argument is a run with its activations (`make demo` makes this one), the second its target. Every line is one
setting of `alignment.layer_pairs` against the alignment that solves all pairs.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tmjax.activations import store
from tmjax.align.alignment import align
from tmjax.checkpoints.load import load_model
from tmjax.recipes.merge import AlignmentOptions

SETTINGS = (
    {"layer_pairs": "coarse", "layer_mass": 0.95},
    {"layer_pairs": "coarse", "layer_mass": 0.8},
    {"layer_pairs": "coarse", "layer_mass": 0.8, "coarse_units": 64},
    {"layer_pairs": "band", "layer_band": 0.25},
    {"layer_pairs": "band", "layer_band": 0.5},
)


def main(
    run: Annotated[Path, typer.Argument(help="Run directory with activations.")],
    target: Annotated[Path, typer.Argument(help="The run's target checkpoint.")],
) -> None:
    """Prints, for each setting, pairs solved and the largest share of a target layer's weights that was left out."""
    projections = load_model(target).projections
    both = [store.read(run / "activations" / side) for side in ("target", "source")]
    full = align(*both, projections, AlignmentOptions())
    for setting in SETTINGS:
        found = align(*both, projections, AlignmentOptions(**setting))
        solved = [np.asarray(plans.solved) for plans in found.plans.values()]
        reported = max(facts["dropped_max"] for facts in found.layer_facts().values())
        lost = [
            1 - (full.layer_plans[role].weights * (plan.weights > 0)).sum(1).min()
            for role, plan in found.layer_plans.items()
        ]
        print(
            f"{setting}: solved {sum(int(s.sum()) for s in solved)} of {sum(s.size for s in solved)} pairs, "
            f"left out {reported:.3f} reported, {max(lost):.3f} in truth"
        )


if __name__ == "__main__":
    typer.run(main)
