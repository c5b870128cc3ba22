"""Eight fake devices on the CPU, and the checkpoints that come with the repository."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest

REPO = Path(__file__).resolve().parent.parent
hypothesis.settings.register_profile("tmjax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("tmjax")


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
def stories_dir() -> Path:
    """A published Llama-layout checkpoint with its greedy continuation."""
    return REPO / "tests/data/stories260k"
