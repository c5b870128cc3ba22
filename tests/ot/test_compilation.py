"""Alignments compile for a TPU that is not here; needs the `libtpu` wheel, which compiles without a device."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tmjax import ot

#: In a process of its own: the TPU compiler ends the process where it fails.
PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tmjax.align.features import FeatureSite
from tmjax.align.plans import solve_chunk
from tmjax.ot import make_solver

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
where = SingleDeviceSharding(device)
site = FeatureSite(*(jax.ShapeDtypeStruct((3, 200, n), jnp.float16, sharding=where) for n in (256, 512)))
pairs = jax.ShapeDtypeStruct((9, 2), jnp.int32, sharding=where)
solver = make_solver("scaling", epsilon=0.02, together=4)
solve_chunk.lower(site, pairs, solver, False, "potentials", None, None).compile()
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_problems_solved_together_compile_for_a_tpu() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-2000:]


def test_a_written_cost_is_behind_a_barrier() -> None:
    """Without it a product captured by a branch ends the TPU compiler; this runs where libtpu is not installed."""
    features = (jnp.zeros((2, 5, 3)), jnp.zeros((2, 5, 4)))
    program = jax.make_jaxpr(lambda x, y: ot.cost_matrix(ot.FeatureCost(x, y)))(*features)
    assert program.eqns[-1].primitive.name == "optimization_barrier"
