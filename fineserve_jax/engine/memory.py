"""How many bytes the KV arena gets, and whether the device has them."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import psutil
from pydantic import ByteSize, TypeAdapter, ValidationError

from fineserve_jax.errors import ConfigError

DEFAULT_ON_CPU = 512 * 2**20
DEFAULT_FRACTION = 0.5
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def kv_memory_bytes(setting: int | float | str | None, devices: Sequence[jax.Device]) -> int:
    """Bytes that `kv_memory` asks for on each of these devices.

    Args:
        setting: bytes, a fraction in (0, 1), either as a string, a string with a unit ("256MiB"), or None.
        devices: all of a kind. CPUs are parts of one machine, whose memory they share.

    Raises:
        ConfigError: a setting that is no size, not positive, or more than the device's memory.
    """
    device = devices[0]
    capacity = device_memory_bytes(device) // (len(devices) if device.platform == "cpu" else 1)
    if setting is None:
        on_cpu = device.platform == "cpu"
        return DEFAULT_ON_CPU if on_cpu else int(DEFAULT_FRACTION * min(map(free_memory_bytes, devices)))
    size = _parse(setting, capacity)
    if size <= 0:
        raise ConfigError(f"kv_memory={setting!r} is no memory at all; give a size such as '256MiB' or 0.25")
    if size > capacity:
        raise ConfigError(
            f"kv_memory={setting!r} is {format_bytes(size)}, more than the {format_bytes(capacity)} of "
            f"{_named(devices)}; give less, or a fraction such as 0.5"
        )
    return size


def _named(devices: Sequence[jax.Device]) -> str:
    return str(devices[0]) if len(devices) == 1 else f"each of {len(devices)} devices"


def host_memory_bytes(setting: int | float | str) -> int:
    """Bytes of host memory that `swap_memory` asks for; as `kv_memory_bytes`, but 0 is allowed."""
    capacity = host_capacity_bytes()
    size = _parse(setting, capacity, "swap_memory")
    if not 0 <= size <= capacity:
        raise ConfigError(
            f"swap_memory={setting!r} is {format_bytes(size)}; give 0 to {format_bytes(capacity)}, the host's memory"
        )
    return size


def _parse(setting: int | float | str, capacity: int, name: str = "kv_memory") -> int:
    not_a_size = ConfigError(
        f"{name}={setting!r} is not a size; give bytes, a size such as '256MiB' or '2GB', "
        "or a fraction of the device's memory such as 0.25"
    )
    try:
        number = float(setting)
    except ValueError:
        if not str(setting).rstrip()[-1:].isalpha():  # ByteSize reads "50%" as 50 bytes
            raise not_a_size from None
        try:
            return int(TypeAdapter(ByteSize).validate_python(setting))
        except ValidationError:
            raise not_a_size from None
    if not math.isfinite(number):
        raise not_a_size
    # 1 is a byte, as every whole number; the whole memory could not be had anyway.
    return int(number * capacity) if 0 < number < 1 else int(number)


def device_memory_bytes(device: jax.Device) -> int:
    """Memory of the device; for a CPU the machine's, or what this process's control group may use."""
    return host_capacity_bytes() if device.platform == "cpu" else int(device.memory_stats()["bytes_limit"])


def host_capacity_bytes() -> int:
    """Memory of the machine, or what this process's control group may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return total if limit == "max" else min(total, int(limit))


def host_available_bytes() -> int:
    """Memory of the machine that is to be had without swapping, or what is left of what this process's control group
    may use of it."""
    available, used = int(psutil.virtual_memory().available), CGROUP_LIMIT.with_name("memory.current")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    if limit == "max" or not used.exists():
        return available
    reclaimable = re.search(r"^inactive_file (\d+)$", CGROUP_LIMIT.with_name("memory.stat").read_text(), re.MULTILINE)
    cached = int(reclaimable[1]) if reclaimable else 0
    return max(0, min(available, int(limit) - int(used.read_text()) + cached))


def free_memory_bytes(device: jax.Device) -> int:
    """Memory of the device that is not in use; for a CPU the machine's."""
    if device.platform == "cpu":
        return host_available_bytes()
    stats = device.memory_stats()
    return int(stats["bytes_limit"] - stats["bytes_in_use"])


def format_bytes(size: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
