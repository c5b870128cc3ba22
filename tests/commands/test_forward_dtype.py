"""The dtype of forward passes: `auto` is decided by the machine, and a run keeps what was decided."""

import pytest

from tmjax import backend
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.merge.inputs import Inputs
from tmjax.recipes.adapt import build_adapt_recipe
from tmjax.recipes.base import read_recipe
from tmjax.recipes.forward_dtype import with_dtype
from tmjax.transfer.recipe import build_recipe

GIVEN = {"source": "-", "target": "-", "texts": "-", "out": "-"}


@pytest.fixture(params=["tpu", "gpu"])
def accelerator(request):
    backend.compile_for(backend.Machine(request.param, 16 * 2**30))
    yield
    backend.compile_for(None)


@pytest.mark.parametrize("build", [build_recipe, build_adapt_recipe])
def test_auto_is_bfloat16_on_accelerators_alone(build, accelerator) -> None:
    assert build(GIVEN).dtype == "auto" and with_dtype(build(GIVEN)).dtype == "bfloat16"
    assert with_dtype(build(GIVEN | {"dtype": "float32"})).dtype == "float32"


@pytest.mark.parametrize(("build", "inputs"), [(build_recipe, Inputs), (build_adapt_recipe, AdaptInputs)])
def test_auto_is_float32_on_a_cpu(build, inputs) -> None:
    assert with_dtype(build(GIVEN)).dtype == inputs(build(GIVEN)).dtype.name == "float32"
    assert inputs(build(GIVEN | {"dtype": "bfloat16"})).dtype.name == "bfloat16"


def test_a_run_keeps_its_dtype(small) -> None:
    assert read_recipe(small / "recipe.yaml")["dtype"] == "float32"
