"""A family in a file of its own outside the package: a copy of one of ours, offered by an entry point."""

import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SPEC, stored

from tmjax import cli
from tmjax.checkpoints.hf import export
from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.models.decoder import forward
from tools.make_checkpoint import make_checkpoint


@pytest.fixture
def theirs(tmp_path, monkeypatch, repo, llama_dir) -> tuple[Path, Path]:
    """A Mistral checkpoint, and the same under a model type of which only another package knows."""
    source = (repo / "tmjax/models/families/mistral.py").read_text()
    (tmp_path / "their_family.py").write_text(source.replace('Family("mistral"', 'Family("theirs"'))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "their_family", None)
    monkeypatch.delitem(sys.modules, "their_family")
    entry = metadata.EntryPoint("theirs", "their_family:FAMILY", "tmjax.families")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == "tmjax.families" else [])
    spec = dataclasses.replace(SPEC, vocab=4096)
    ours = make_checkpoint(tmp_path / "ours", "mistral", spec, tokenizer=llama_dir)
    other = make_checkpoint(tmp_path / "other", "mistral", spec, tokenizer=llama_dir)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "theirs"}))
    return ours, other


def test_a_family_of_another_package_loads_computes_and_is_written_back(theirs, tmp_path, capsys) -> None:
    ours, other = (load_model(directory) for directory in theirs)
    assert other.family.model_type == "theirs"
    ids = jnp.arange(12)[None]
    one, two = (forward(model.spec, model.params, ids) for model in (ours, other))
    np.testing.assert_array_equal(one, two)
    export(other, tmp_path / "written")
    assert stored(tmp_path / "written") == stored(theirs[1])
    assert cli.run(["doctor", "--source", str(theirs[0]), "--target", str(theirs[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["target"]["family"] == "theirs"


def test_without_the_entry_point_the_list_of_families_is_told(theirs, monkeypatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    with pytest.raises(InputError, match="model_type 'theirs' is not supported"):
        load_model(theirs[1])
