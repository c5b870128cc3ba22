"""Kinds of accelerators that programs are compiled for: published figures, and devices that need not be there."""

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tmjax.backend import Machine
from tmjax.errors import InputError

GIB = 2**30
INSTALL = "pip install 'tmjax[plan]'"
#: Wiring of slices by the number of chips: of two axes (v5e, v6e) and of three (v4, v5p).
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_DEEP = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
#: Properties of an H100 by which the GPU compiler chooses its kernels, from the device itself.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Figures:
    """Published figures of a device.

    Attributes:
        platform: Backend: `tpu` or `gpu`.
        memory: Bytes that programs can use, as the compiler says (TPU) or the driver reports (GPU).
        peak: Products and additions per second, by class of matrix product: `bfloat16`, `tensor32` (float32 at default
            precision) and `float32` (all of its digits: six passes of bfloat16 on a TPU).
        bandwidth: Bytes per second of its memory.
        interconnect: Bytes per second that it sends to others of its slice or node.
        source: Publication of the figures.
    """

    platform: str
    memory: float
    peak: Mapping[str, float]
    bandwidth: float
    interconnect: float
    source: str


def _tpu(memory: float, peak: float, bandwidth: float, interconnect: float, page: str) -> Figures:
    peaks = {"bfloat16": peak, "tensor32": peak, "float32": peak / 6}
    return Figures("tpu", memory * GIB, peaks, bandwidth, interconnect / 8, f"Google Cloud documentation, {page}")


#: Figures by kind. Interconnects of TPUs are published in bits per second and chip.
FIGURES: Mapping[str, Figures] = {
    "v4": _tpu(30.75, 275e12, 1228e9, 2400e9, "TPU v4"),
    "v5e": _tpu(15.75, 197e12, 819e9, 1600e9, "TPU v5e"),
    "v5p": _tpu(95.74, 459e12, 2765e9, 4800e9, "TPU v5p"),
    "v6e": _tpu(31.25, 918e12, 1640e9, 3584e9, "TPU v6e"),
    "h100": Figures(
        "gpu",
        79.6 * GIB,
        {"bfloat16": 989.4e12, "tensor32": 494.7e12, "float32": 66.9e12},
        3.35e12,
        450e9,
        "NVIDIA H100 Tensor Core GPU datasheet, SXM5, dense; NVLink 900 GB/s in both directions together",
    ),
}


@dataclass(frozen=True)
class Topology:
    """A number of devices of one kind.

    Attributes:
        text: The topology as it was given.
        kind: A key of `FIGURES`.
        devices: Number of devices that programs run on.
        wiring: Name by which the compiler knows it.
    """

    text: str
    kind: str
    devices: int
    wiring: str

    @property
    def figures(self) -> Figures:
        """Published figures of its devices."""
        return FIGURES[self.kind]

    @property
    def machine(self) -> Machine:
        """The machine that choices by the kind of device are made for."""
        return Machine(self.figures.platform, int(self.figures.memory))

    def open(self) -> list[Any]:
        """Returns its devices, which need not be there; the compilers must be installed (`require_compiler`)."""
        from jax.experimental import topologies

        if self.kind == "h100":
            import jax

            jax.devices()  # registers the plugin, whose devices stay unused
            described = topologies.get_topology_desc(
                platform="cuda", topology_name=self.text, topology=self.wiring, target_config=H100
            )
        else:
            extra = {"chip_config_name": "megacore"} if self.kind == "v4" else {}
            described = topologies.get_topology_desc(platform="tpu", topology_name=self.wiring, **extra)
        return list(described.devices)[: self.devices]


def parse_topology(text: str) -> Topology:
    """Reads the name of a topology.

    Args:
        text: As Google names slices (`v5e-16`, `v6e-8`: chips; `v5p-8`, `v4-32`: cores, two a chip), `KIND:AxB[xC]`
            by its wiring, or `h100:N` for the GPUs of a node.

    Raises:
        InputError: There is no such topology.
    """
    named = re.fullmatch(r"(v4|v5e|v5p|v6e|h100)([-:])(\d+(?:x\d+)*)", text.strip().lower())
    if named is None:
        raise InputError(f"topology {text!r}: write for example v5e-16, v5p-8, v6e:4x4 or h100:8")
    kind, _, size = named.groups()
    if kind == "h100":
        if not size.isdecimal() or not 1 <= int(size) <= 8:
            raise InputError(f"topology {text!r}: a node has h100:1 to h100:8")
        return Topology(text, kind, int(size), f"1 x 1 x {size}")
    if not size.isdecimal():
        return Topology(text, kind, math.prod(map(int, size.split("x"))), f"{kind}:{size}")
    deep = kind in ("v4", "v5p")
    chips = int(size) // 2 if deep else int(size)
    wirings = _DEEP if deep else _FLAT
    if chips == 1 and not deep:  # one chip of a host of four
        return Topology(text, kind, 1, f"{kind}:{wirings[4]}")
    if chips not in wirings or (deep and int(size) % 2):
        sizes = ", ".join(f"{kind}-{2 * number if deep else number}" for number in wirings)
        raise InputError(f"topology {text!r}: slices of this kind are {sizes}")
    return Topology(text, kind, chips, f"{kind}:{wirings[chips]}")


def require_compiler(topology: Topology) -> None:
    """Raises InputError, which says what to install, where the compiler of a topology is missing."""
    needed = {"tpu": ("libtpu",), "gpu": ("jax_plugins.xla_cuda12",)}[topology.figures.platform]
    for module in needed:
        try:
            missing = importlib.util.find_spec(module) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            packages = "libtpu" if module == "libtpu" else "jax-cuda12-plugin and jax-cuda12-pjrt"
            raise InputError(f"compiling for {topology.text} needs {packages}: {INSTALL}")


def environment(topology: Topology) -> dict[str, str]:
    """Returns the variables under which a process compiles for a topology, without looking for devices."""
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if topology.figures.platform == "gpu":
        variables["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
    return variables
