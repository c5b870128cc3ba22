"""The difference of two checkpoints as a LoRA: the error that the singular values say, and PEFT loads it."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from tmjax import cli
from tmjax.checkpoints.hf import export
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.lora_export import truncated
from tmjax.commands.convert import extract_lora

# Of PEFT and transformers about each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize(("shape", "rank"), [((12, 30), 4), ((30, 12), 4), ((6, 9), 8), ((7, 7), 7)])
def test_the_error_is_that_of_the_singular_values(shape, rank) -> None:
    change = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (a, b), error = truncated(change, rank)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank) and a.dtype == b.dtype == np.float32
    values = np.linalg.svd(change.astype(np.float64), compute_uv=False)
    expected = np.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2))
    assert error == pytest.approx(expected, abs=1e-7)
    assert np.linalg.norm(change - b @ a) / np.linalg.norm(change) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-5)


def test_no_change_is_no_error() -> None:
    (a, b), error = truncated(np.zeros((3, 5), np.float32), 2)
    assert error == 0 and not a.any() and not b.any()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, qwen2_dir) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(vocab_size=2048, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(qwen2_dir / name, folder / name)
    return folder


def changed(base: Path, folder: Path, roles: tuple[str, ...], rank: int, *others: str) -> Path:
    """A copy of a model: projections of some roles are changed by matrices of a rank, other parameters by noise."""
    rng, model = np.random.default_rng(0), load_model(base)
    params = {path: np.asarray(value, np.float32) for path, value in model.params.items()}
    for role in roles:
        path = model.projections[role].path
        layers, out, into = params[path].shape
        left, right = rng.normal(size=(layers, out, rank)), rng.normal(size=(layers, rank, into))
        params[path] = params[path] + (0.02 * left @ right).astype(np.float32)
    for path in others:
        params[path] = params[path] + rng.normal(0, 0.01, params[path].shape).astype(np.float32)
    export(model.with_params(params), folder)
    return folder


# Of the Swahili Qwen 2 a matrix a module, of GPT-2 q, k and v in one that is stored transposed.
@pytest.mark.parametrize(("base", "roles", "rank"), [("qwen2_dir", ("q", "down"), 3), ("gpt2", ("q", "v", "o"), 6)])
def test_peft_folds_it_into_the_changed_model(base, roles, rank, request, tmp_path) -> None:
    base = request.getfixturevalue(base)
    model = changed(base, tmp_path / "changed", roles, 3)
    done = extract_lora(model, tmp_path / "adapter", base=base, rank=rank)
    assert max(done.errors.values()) < 1e-5 and not done.left_out
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank and len(config["target_modules"]) == 2
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 2048, (2, 30)))
    with torch.no_grad():
        wanted = expected(ids).logits
        assert (adapted(ids).logits - wanted).abs().max() < 1e-3 * wanted.std()
    again, own = load_model(tmp_path / "adapter"), load_model(model)
    for path, value in own.params.items():
        np.testing.assert_allclose(again.params[path], value, atol=2e-5, err_msg=path)


def test_what_the_adapter_has_no_part_of_is_said(qwen2_dir, tmp_path, capsys) -> None:
    model = changed(qwen2_dir, tmp_path / "changed", ("up",), 5, "embed.weight", "norm.weight")
    words = ["convert", model, tmp_path / "adapter", "--to", "lora", "--base", qwen2_dir, "--rank", "2", "--json"]
    assert cli.run(list(map(str, words))) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["left_out"]) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(0.001 < size < 1 for size in result["left_out"].values())
    errors = {name: error for name, error in result["errors"].items() if error}
    assert len(errors) == 4 and all("up_proj" in name and 0.3 < error < 0.9 for name, error in errors.items())


def test_faults_are_one_line(qwen2_dir, gpt2, tmp_path, capsys) -> None:
    def fault(*words: object) -> str:
        assert cli.run(["convert", *map(str, words)]) == 2
        return " ".join(capsys.readouterr().err.split())

    out = tmp_path / "adapter"
    assert "needs --base" in fault(qwen2_dir, out, "--to", "lora")
    assert "needs --base" in fault(qwen2_dir, out, "--to", "hf", "--base", qwen2_dir)
    assert "nothing to write as a LoRA" in fault(qwen2_dir, out, "--to", "lora", "--base", qwen2_dir)
    assert "differ in tensors or shapes" in fault(gpt2, out, "--to", "lora", "--base", qwen2_dir)
    assert "must be 1 or more" in fault(gpt2, out, "--to", "lora", "--base", qwen2_dir, "--rank", "0")
    assert "leave --dtype out" in fault(gpt2, out, "--to", "lora", "--base", gpt2, "--dtype", "bfloat16")
    assert not out.exists()
