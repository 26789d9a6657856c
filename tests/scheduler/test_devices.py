"""The table of devices: recognised by what JAX calls them, and by their names."""

import pytest

from fineserve_jax.errors import ConfigError
from fineserve_jax.scheduler.devices import CPU, DEVICES, UNKNOWN_ACCELERATOR, device_roofline, get_device


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_devices_are_recognised_by_what_jax_calls_them(device_kind, name):
    roofline, device = device_roofline("gpu", device_kind), get_device(name)
    assert (roofline.flops, roofline.bandwidth) == (device.flops, device.bandwidth)


def test_other_devices_start_from_the_peaks_of_a_typical_one():
    assert device_roofline("gpu", "NVIDIA L40S") is UNKNOWN_ACCELERATOR
    assert device_roofline("cpu", "cpu") is CPU


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=f"device='b300' is not known; choose one of {', '.join(DEVICES)}"):
        get_device("b300")
