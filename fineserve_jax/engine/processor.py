"""What processor this is, for figures that are compared between machines."""

import os
import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
"""Those that change how fast matrices are multiplied, as Linux calls them."""


def processor_name() -> str:
    """The processor, how many of its cores this process may use, and which of `INSTRUCTION_SETS` it has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)).split())
    sets = [name for name in INSTRUCTION_SETS if name in flags]
    known = names[0] if names else platform.processor() or platform.machine()
    return f"{known}, {cores} cores" + (f", {' '.join(sets)}" if sets else "")
