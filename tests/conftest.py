"""Eight fake devices on the CPU, and the checkpoints that come with the repository."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the suite's time, and LLVM's expensive passes are most of that. Stored numbers (`test_golden.py`)
# and the runs of `-m slow` are computed as users compute them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + ("" if "slow" in sys.argv else " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"),
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# There are as many workers as cores: a second thread of PyTorch would find none, and OpenMP's threads wait busily.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the time is XLA's: workers, files of tests and the processes that they start share what was compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# With a limit JAX locks the cache, so that nobody reads half an entry.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**31))

import hypothesis
import jax
import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
hypothesis.settings.register_profile("tmjax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("tmjax")


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Compiled programs of one file's tests do not pile up: thousands in one process have ended in an abort of XLA."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def llama_dir() -> Path:
    """The bundled merge's source: Llama, bfloat16, tied."""
    return REPO / "experiments/swahili/source"


@pytest.fixture(scope="session")
def qwen2_dir() -> Path:
    """The bundled merge's target: Qwen 2, float32, tied."""
    return REPO / "experiments/swahili/target"


@pytest.fixture(scope="session")
def gpt_neox_dir() -> Path:
    """The Wolof GPT-NeoX, whose output rows are its own."""
    return REPO / "experiments/wolof/target"


@pytest.fixture(scope="session")
def stories_dir() -> Path:
    """A published Llama-layout checkpoint with its greedy continuation."""
    return REPO / "tests/data/stories260k"


@pytest.fixture(scope="session")
def texts(repo, tmp_path_factory) -> dict[str, str]:
    """The first verses of the bundled files: enough to run everything, small enough to run it often."""
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("calibration", 24), ("valid", 12), ("test", 20)):
        lines = (repo / f"experiments/swahili/texts/swahili.{name}.jsonl").read_text().splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: str(folder / f"{name}.jsonl") for name in ("calibration", "valid", "test")}


@pytest.fixture(scope="session")
def flags(texts, llama_dir, qwen2_dir) -> list[str]:
    models = ["--source", str(llama_dir), "--target", str(qwen2_dir)]
    return [*models, "--texts", texts["calibration"], "--valid", texts["valid"], "--test", texts["test"]]


@pytest.fixture(scope="session")
def small_flags(texts, llama_dir, qwen2_dir, tmp_path_factory) -> list[str]:
    """The same texts and tokenizers with random models of two and three layers, where only the run itself matters."""
    from tools.make_checkpoint import family_spec, make_checkpoint

    models = []
    # One width for all sites of a model: a solver is compiled for one shape.
    for side, family, layers, width, rows, like in (
        ("source", "llama", 3, 40, 4096, llama_dir),
        ("target", "qwen2", 2, 32, 2048, qwen2_dir),
    ):
        shape = {"vocab": rows, "layers": layers, "heads": 4, "kv_heads": 4, "head_dim": width // 4}
        shape |= {"hidden": width, "mlp": width, "max_positions": 512, "tied_embeddings": True}
        spec = family_spec(family, **shape)
        place = tmp_path_factory.mktemp("small") / side
        make_checkpoint(place, family, spec, tokenizer=like, scale=0.1, seed=layers)
        models += [f"--{side}", str(place)]
    return [*models, "--texts", texts["calibration"], "--valid", texts["valid"], "--test", texts["test"]]


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> str:
    """What keeps the runs of these tests short: few sites, few trials."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    short = {"coefficients": {"alphas": [0.03, 0.1], "betas": [-0.05, 0.0]}, "evaluation": {"draws": 500}}
    short |= {"preset": "barycentric"}
    # Of so few rows float16 would make the last bits, in which a mesh differs, show.
    short |= {"alignment": {"feature_dtype": "float32"}, "mesh": "data=1"}
    path.write_text(yaml.safe_dump(short))
    return str(path)


@pytest.fixture(scope="session")
def solving(recipe_file, tmp_path_factory) -> str:
    """The same with the default preset, which solves for the source's predictions."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    told = yaml.safe_load(Path(recipe_file).read_text()) | {"preset": "predictions"}
    told["operators"] = [
        {"transport": {}},
        {"embeddings": {"alphas": [0.1, 0.3], "kappas": [300.0]}},
        {"predictions": {"rounds": 2, "generated_texts": 4, "tokens": 8}},
    ]
    path.write_text(yaml.safe_dump(told))
    return str(path)


@pytest.fixture(scope="session")
def plain(tmp_path_factory, flags, recipe_file) -> Path:
    """A run without controls in this process, to be compared with."""
    from tmjax import cli

    out = tmp_path_factory.mktemp("plain") / "run"
    assert cli.run(["merge", recipe_file, *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def small(tmp_path_factory, small_flags, recipe_file) -> Path:
    """The same of the small models."""
    from tmjax import cli

    out = tmp_path_factory.mktemp("small") / "run"
    assert cli.run(["merge", recipe_file, *small_flags, "--out", str(out)]) == 0
    return out
