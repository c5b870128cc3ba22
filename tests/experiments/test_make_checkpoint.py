"""`tools/make_checkpoint.py`: what it writes loads everywhere, is what was asked for, and is streamed."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
import transformers
from helpers import QWEN2, SPEC, read_config, stored

from tmjax.checkpoints.formats.safetensors import INDEX_NAME
from tmjax.checkpoints.load import load_model
from tmjax.models.decoder import forward
from tmjax.models.families import FAMILIES
from tools import make_checkpoint as tool
from tools.make_checkpoint import make_checkpoint

transformers.utils.logging.disable_progress_bar()


#: The parity tests have every family; here a few are enough of what is not slow.
QUICK = {"llama": ("float32", "bfloat16", "float16"), "gpt2": ("float32",), "glm4_moe": ("float32",)}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=() if family in QUICK and dtype in QUICK[family] else pytest.mark.slow)
        for family in sorted(FAMILIES)
        for dtype in ("float32", "bfloat16", "float16")
    ],
)
def test_made_checkpoint_loads_in_transformers_and_here(tmp_path, family, dtype):
    sizes = {"vocab": 50, "hidden": 48, "layers": 3, "heads": 6, "kv_heads": 2, "mlp": 40, "max_positions": 64}
    llama3 = tool.ROTARY["llama3"] if family in ("llama", "qwen2", "granite") else None
    spec = tool.family_spec(family, rotary=llama3, tied_embeddings=family != "llama", **sizes)
    directory = make_checkpoint(tmp_path / "x", family, spec, dtype=dtype, max_shard_size="5KB")
    assert (directory / INDEX_NAME).is_file()
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reference.dtype == getattr(torch, dtype)
    model = load_model(directory)
    assert model.spec == spec
    ids = torch.arange(40)[None]
    with torch.no_grad():
        # Loaded anew: a model loaded in 16 bits keeps buffers of 16 bits, such as Gemma's embedding scale.
        wide = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        theirs = wide(ids).logits.numpy()
    ours = forward(model.spec, model.params, ids.numpy())
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * theirs.std(), rtol=0)


def test_made_tensors_depend_on_name_and_seed_alone(tmp_path):
    one = stored(make_checkpoint(tmp_path / "1", "llama", SPEC))
    two = stored(make_checkpoint(tmp_path / "2", "llama", dataclasses.replace(SPEC, layers=5), max_shard_size="1KB"))
    other = stored(make_checkpoint(tmp_path / "3", "llama", SPEC, seed=1))
    assert one.items() <= two.items()
    assert all(one[name] != other[name] for name in one)
    assert len({data for _, _, data in one.values()}) == len(one)


def test_made_tensors_have_the_scale_asked_for(tmp_path):
    spec = dataclasses.replace(QWEN2, hidden=256, mlp=500, vocab=300)
    sharp = load_model(make_checkpoint(tmp_path / "1", "qwen2", spec)).params
    small = load_model(make_checkpoint(tmp_path / "2", "qwen2", spec, scale=0.02)).params
    for path, value in sharp.items():
        if path.endswith(("norm.weight", ".bias")):
            assert value.std() == pytest.approx(0.3, rel=0.2)
            assert (value.mean() > 0.9) == path.endswith("weight")
            assert set(np.unique(small[path])) == {float(path.endswith("weight"))}
        else:
            assert value.std() == pytest.approx(2 / np.sqrt(value.shape[-1]), rel=0.03)
            assert small[path].std() == pytest.approx(0.02, rel=0.03)


def test_made_checkpoint_is_streamed(tmp_path):
    spec = dataclasses.replace(SPEC, hidden=512, mlp=1024, layers=8, vocab=1000)
    tracemalloc.start()
    try:
        make_checkpoint(tmp_path / "x", "llama", spec)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sizes = [len(data) for _, _, data in stored(tmp_path / "x").values()]
    assert sum(sizes) > 50e6
    assert peak < 5 * max(sizes)


def run_tool(monkeypatch, capsys, *args: object) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["make_checkpoint", *map(str, args)])
    status = tool.main()
    out, err = capsys.readouterr()
    assert out == ""
    return status, err


def test_make_checkpoint_command(monkeypatch, capsys, tmp_path, llama_dir):
    out = tmp_path / "x"
    options = ["--family", "qwen2", "--hidden", 32, "--layers", 2, "--heads", 4, "--kv-heads", 2, "--head-dim", 6]
    options += ["--mlp", 48, "--vocab", 4100, "--untied", "--dtype", "bfloat16", "--seed", 3, "--max-shard-size", "9KB"]
    options += ["--rope-scaling", "llama3", "--tokenizer", llama_dir]
    assert run_tool(monkeypatch, capsys, out, *options) == (0, "")
    model = load_model(out)
    sizes = {"vocab": 4100, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp": 48}
    assert dataclasses.asdict(model.spec).items() >= (sizes | {"tied_embeddings": False}).items()
    assert model.spec.rotary.scaling == "llama3"
    assert (out / "tokenizer.json").read_bytes() == (llama_dir / "tokenizer.json").read_bytes()
    assert read_config(out)["eos_token_id"] == read_config(llama_dir)["eos_token_id"]
    status, err = run_tool(monkeypatch, capsys, out)
    assert status == 2
    assert "--overwrite" in err
    assert run_tool(monkeypatch, capsys, out, "--overwrite", "--layers", 1) == (0, "")
    assert load_model(out).spec.layers == 1


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        ([], "Missing argument"),
        (["x", "--nope"], "--nope"),
        (["x", "--hidden", "many"], "--hidden"),
        (["x", "--layers", "0"], "--layers"),
        (["x", "--hidden", "30"], "--head-dim"),
        (["x", "--kv-heads", "3"], "cannot share"),
        (["x", "--family", "mamba"], "supported are arcee, bloom"),
        (["x", "--dtype", "int8"], "supported are float32"),
        (["x", "--scale", "wide"], "neither a number nor sharp"),
        (["x", "--scale", "-1"], "positive"),
        (["x", "--scale", "nan"], "positive"),
        (["x", "--rope-scaling", "yarn"], "not one of default"),
        (["x", "--max-shard-size", "big"], "not a size"),
        (["x", "--tokenizer", "absent"], "no usable tokenizer"),
        (["x", "--tokenizer", "LLAMA", "--vocab", "4095"], "4096 tokens"),
    ],
    ids=str,
)
def test_make_checkpoint_refuses(monkeypatch, capsys, tmp_path, llama_dir, args, fragment):
    monkeypatch.chdir(tmp_path)
    status, err = run_tool(monkeypatch, capsys, *[llama_dir if arg == "LLAMA" else arg for arg in args])
    assert status == 2
    assert err.startswith("make_checkpoint: error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert not list(tmp_path.iterdir())
