"""Presets: named lists of operators with their settings. The recipe's own keys win."""

from typing import Any

from tmjax.recipes.base import ATTENTION_ROLES

#: The preset of a recipe that names none.
DEFAULT_PRESET = "predictions"
#: `paper` is the method of arXiv:2602.05495 as printed, `barycentric` transports weights alone, `predictions` goes on
#: to blend embeddings and to solve for the source's predictions, `quick` does so with fewer generated texts and rounds.
PRESETS: dict[str, dict[str, Any]] = {
    "predictions": {"operators": [{"transport": {}}, {"embeddings": {}}, {"predictions": {}}]},
    "quick": {
        "operators": [{"transport": {}}, {"embeddings": {}}, {"predictions": {"generated_texts": 600, "rounds": 10}}]
    },
    "barycentric": {"operators": [{"transport": {}}]},
    "paper": {
        "alpha": 0.1,
        "activations": {"pooling": "sequence"},
        "alignment": {
            "cost": "correlation",
            "epsilon": 0.1,
            "max_iterations": 200,
            "threshold": 1e-6,
            "layer_epsilon": 0.1,
            "layer_max_iterations": 1000,
            "layer_threshold": 1e-6,  # the paper asks for 1e-9, which float32 marginals cannot show
            "layer_cost_scale": "median",
            "feature_dtype": "float32",
        },
        "operators": [
            {
                "transport": {
                    "map": "paper",
                    "roles": list(ATTENTION_ROLES),
                    "mask_top_k": 128,
                    "norm_match": False,
                    "bias": "transported",
                }
            }
        ],
        "coefficients": {"beta": "tied"},
    },
}
