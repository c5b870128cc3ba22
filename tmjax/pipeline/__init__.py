"""The stages of a run, each with its input hash, skipped when its output is intact."""

from tmjax.pipeline.alignment import Progress, Warn
from tmjax.pipeline.evaluation import evaluate_models
from tmjax.pipeline.inputs import Inputs
from tmjax.pipeline.merge import Merge, open_run

__all__ = ["Inputs", "Merge", "Progress", "Warn", "evaluate_models", "open_run"]
