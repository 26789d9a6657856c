"""The chips that kernels are compiled for."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

Platform = Literal["gpu", "tpu"]


@dataclass(frozen=True)
class Target:
    """A chip.

    Attributes:
        name: as the table calls it.
        platform: gpu (Triton) or tpu (Mosaic).
        topology: what JAX's ahead-of-time compiler calls it.
        arch: of a GPU, what ptxas calls it.
        config: of a GPU, XLA's GpuTargetConfigProto in text form.
    """

    name: str
    platform: Platform
    topology: str
    arch: str = ""
    config: str = ""


H100 = Target(
    "H100",
    "gpu",
    "h100",
    "sm_90a",
    """
    gpu_device_info {
      threads_per_block_limit: 1024 threads_per_warp: 32
      shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
      threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
      cuda_compute_capability { major: 9 }
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }
    platform_name: "CUDA"
    dnn_version_info { major: 9 minor: 7 }
    runtime_version { major: 12 minor: 8 patch: 0 }
    device_description_str: "NVIDIA H100 80GB HBM3"
    """,
)

# A100 80GB SXM: NVIDIA A100 data sheet and the whitepaper "NVIDIA A100 Tensor Core GPU Architecture".
A100 = Target(
    "A100",
    "gpu",
    "a100",
    "sm_80",
    """
    gpu_device_info {
      threads_per_block_limit: 1024 threads_per_warp: 32
      shared_memory_per_block: 49152 shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
      threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85094957056
      cuda_compute_capability { major: 8 }
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }
    platform_name: "CUDA"
    dnn_version_info { major: 9 minor: 7 }
    runtime_version { major: 12 minor: 8 patch: 0 }
    device_description_str: "NVIDIA A100-SXM4-80GB"
    """,
)

V5E = Target("v5e", "tpu", "v5e:2x2")
V6E = Target("v6e", "tpu", "v6e:2x2")

# Slices and hosts of 8, for steps that several chips compute together.
H100_8 = dataclasses.replace(H100, name="8 x H100")
V5E_8 = dataclasses.replace(V5E, name="v5e-8", topology="v5e:2x4")
V6E_8 = dataclasses.replace(V6E, name="v6e-8", topology="v6e:2x4")
MESH_TARGETS: dict[Platform, tuple[Target, ...]] = {"gpu": (H100_8,), "tpu": (V5E_8, V6E_8)}

TARGETS: dict[Platform, tuple[Target, ...]] = {"gpu": (H100, A100), "tpu": (V5E, V6E)}
