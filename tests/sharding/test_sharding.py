"""The same merge on one device and on a mesh of eight."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec

from tmjax import backend, cli
from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError
from tmjax.sharding.memory import share_mib
from tmjax.sharding.mesh import Layout, parse_mesh

MESH = "data=2,fsdp=2,tensor=2"


def test_mesh_is_parsed_or_refused() -> None:
    assert parse_mesh(None) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert parse_mesh("tensor=2, data=4") == {"data": 4, "fsdp": 1, "tensor": 2}
    for wrong in ("data", "data=0", "data=-1", "data=2,data=2", "rows=2", "data=2;fsdp=2"):
        with pytest.raises(InputError, match="write for example"):
            parse_mesh(wrong)


def test_a_layout_takes_the_devices_that_it_is_given() -> None:
    last = jax.devices()[-2:]
    layout = Layout("auto", [64], devices=last)
    assert layout.sizes == {"data": 1, "fsdp": 2, "tensor": 1}
    assert list(layout.mesh.devices.flat) == last
    with pytest.raises(InputError, match="needs 4 devices, 2 are"):
        Layout("fsdp=4", devices=last)


def test_choices_by_the_device_are_those_of_the_machine_that_is_compiled_for() -> None:
    assert (backend.platform(), share_mib(4, 512)) == ("cpu", 512)
    backend.compile_for(backend.Machine("tpu", 16 * 2**30))
    try:
        assert (backend.platform(), share_mib(4, 512)) == ("tpu", 4096)
    finally:
        backend.compile_for(None)
    assert backend.platform() == jax.default_backend()


def test_parameters_are_split_along_their_logical_axes(qwen2_dir) -> None:
    layout = Layout(MESH)
    model = load_model(qwen2_dir, placement=layout.place)
    plain = load_model(qwen2_dir)
    expected = {
        "blocks.q.weight": PartitionSpec(None, "tensor", "fsdp"),
        "blocks.down.weight": PartitionSpec(None, "fsdp", "tensor"),
        "embed.weight": PartitionSpec("tensor", "fsdp"),
        "blocks.attn_norm.weight": PartitionSpec(None, "fsdp"),
    }
    assert {path: model.params[path].sharding.spec for path in expected} == expected
    for path, value in plain.params.items():
        np.testing.assert_array_equal(np.asarray(model.params[path]), np.asarray(value))


def test_collisions_and_sizes_that_do_not_divide_are_errors() -> None:
    layout = Layout(MESH)
    with pytest.raises(InputError, match="two of its axes"):
        layout.param_sharding("x", ("heads", "mlp"), (4, 4))
    with pytest.raises(InputError, match="does not divide embed=5 of parameter x"):
        layout.param_sharding("x", ("embed",), (5,))
    with pytest.raises(InputError, match="needs 1024 devices"):
        Layout("data=1024")


@pytest.mark.slow
def test_merge_on_eight_devices_equals_one(flags, recipe_file, plain, capsys, tmp_path) -> None:
    assert len(jax.devices()) == 8
    capsys.readouterr()
    out = tmp_path / "run"
    assert cli.run(["merge", recipe_file, *flags, "--out", str(out), "--mesh", MESH, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2} and manifest["devices"] == 8
    one, eight = (safetensors.numpy.load_file(run / "merged/model.safetensors") for run in (plain, out))
    assert one.keys() == eight.keys()
    for name, value in one.items():
        assert np.abs(value - eight[name]).max() <= 1e-5 * np.abs(value).max(), name
    single = json.loads((plain / "manifest.json").read_text())
    for arm, item in manifest["evaluation"].items():
        assert item["bits_per_byte"] == pytest.approx(single["evaluation"][arm]["bits_per_byte"], rel=1e-5)
