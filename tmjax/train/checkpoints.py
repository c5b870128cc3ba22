"""Checkpoints of a training: orbax, written while training goes on, the newest N kept."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tmjax.files.atomic import remove, write_json
from tmjax.runs.hashes import digest
from tmjax.sharding import hosts
from tmjax.train.selection import Selection
from tmjax.train.step import State

_KEY = "key.json"


class Checkpoints:
    """The checkpoints of one training in a directory of their own.

    Args:
        directory: The folder; created if missing.
        key: A JSON value that decides the result of the training; checkpoints of another key are deleted.
        keep: The number of newest checkpoints that are kept.
    """

    def __init__(self, directory: Path, key: object, *, keep: int = 2) -> None:
        directory = Path(directory).absolute()
        record = {"key": digest(key)}
        if hosts.is_first():
            if directory.exists() and _read(directory / _KEY) != record:
                remove(directory)
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / _KEY, record)
        hosts.barrier("checkpoints")
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every save
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            ),
        )

    def latest(self, like: State) -> tuple[int, State, Selection] | None:
        """Returns steps, state and selection of the newest checkpoint, laid out as `like`; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
        args = {"state": ocp.args.StandardRestore(shapes), "facts": ocp.args.JsonRestore()}
        facts = self._manager.restore(step, args=ocp.args.Composite(facts=args["facts"]))["facts"]
        if facts["selected"]:
            best = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like.trained))
            args["best"] = ocp.args.StandardRestore(best)
        arrays = self._manager.restore(step, args=ocp.args.Composite(**args))
        leaves = [arrays["state"][f"{number:05d}"] for number in range(len(arrays["state"]))]
        selection = Selection(
            float("inf") if facts["loss"] is None else facts["loss"],
            facts["step"],
            facts["worse"],
            [(count, loss) for count, loss in facts["history"]],
            dict(arrays["best"]) if facts["selected"] else None,
        )
        return step, jax.tree.unflatten(jax.tree.structure(like), leaves), selection

    def save(self, count: int, state: State, selection: Selection) -> None:
        """Stores a state under the number of steps before it, unless that number is stored already."""
        if count in self._manager.all_steps():
            return
        facts = {
            "loss": selection.loss if np.isfinite(selection.loss) else None,
            "step": selection.step,
            "worse": selection.worse,
            "history": [list(item) for item in selection.history],
            "selected": selection.trained is not None,
        }
        args = {"state": ocp.args.StandardSave(_tree(state)), "facts": ocp.args.JsonSave(facts)}
        if selection.trained is not None:
            args["best"] = ocp.args.StandardSave(dict(selection.trained))
        self._manager.save(count, args=ocp.args.Composite(**args))

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the threads."""
        self._manager.close()


def _tree(state: State) -> dict[str, jax.Array]:
    # Flat and by number: orbax would give optax's named tuples back as mappings.
    return {f"{number:05d}": leaf for number, leaf in enumerate(jax.tree.leaves(state))}


def _read(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
