"""Reads PTX and what ptxas says of it: registers, spills, shared memory, and how wide global loads are.

A load is attributed to the kernel's argument that its address is computed from. Addresses are followed through 64-bit
registers; what is loaded from memory is an index, not an address, and so ends the trail.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)^\}", re.DOTALL | re.MULTILINE)
PARAMETER = re.compile(r"\.param\s+[^,]*?([\w$]+)(?:\[\d+\])?\s*(?:,|$)")
THREADS = re.compile(r"\.reqntid\s+(\d+)")
LOAD = re.compile(r"\bld\.global([.\w:]*?)\.([bufs])(\d+)\s+\{?([^}\[]*?)\}?\s*,\s*\[\s*(%\w+)")
ASYNC_COPY = re.compile(
    r"\bcp\.async\.c[ag]\.shared(?:::cta)?\.global[.\w:]*\s+\[[^\]]*\]\s*,\s*\[\s*(%\w+)[^\]]*\]\s*,\s*(\w+)"
)
LOAD_PARAMETER = re.compile(r"\bld\.param\.\w+\s+(%\w+)\s*,\s*\[([\w$]+)")
ASSIGNMENT = re.compile(
    r"^\s*(?:@!?%\w+\s+)?(?:mov|add|sub|cvta|mad|selp|cvt|or|and|min|max)[.\w]*\s+(%rd\d+)\s*,(.*);", re.MULTILINE
)
REGISTER = re.compile(r"%rd\d+")


@dataclass
class PtxKernel:
    """One kernel of a PTX module.

    Attributes:
        threads: of a program.
        loads: (argument, bytes a thread loads at once) -> how many such instructions; argument None: unknown.
    """

    name: str
    threads: int
    parameters: list[str]
    loads: Counter[tuple[int | None, int]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel takes: registers a thread, bytes spilled by all of a thread's code, and static shared
    memory."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def parse_ptx(text: str) -> dict[str, PtxKernel]:
    """The kernels of a PTX module, by name."""
    return {match[1]: _parse_kernel(match[1], match[2], match[3]) for match in ENTRY.finditer(text)}


def _parse_kernel(name: str, header: str, body: str) -> PtxKernel:
    parameters = PARAMETER.findall(header.replace("\n", " "))
    threads = THREADS.search(body)
    kernel = PtxKernel(name, int(threads[1]) if threads else 0, parameters)
    origins = _trace_addresses(body, parameters)
    for match in LOAD.finditer(body):
        modifiers, bits, address = match[1], int(match[3]), match[5]
        vector = re.search(r"\.v(\d)", modifiers)
        width = bits // 8 * (int(vector[1]) if vector else 1)
        kernel.loads[_only(origins.get(address)), width] += 1
    for match in ASYNC_COPY.finditer(body):
        kernel.loads[_only(origins.get(match[1])), int(match[2], 0)] += 1
    return kernel


def _trace_addresses(body: str, parameters: list[str]) -> dict[str, set[int]]:
    """Of each 64-bit register, the arguments that it may have been computed from."""
    number = {name: i for i, name in enumerate(parameters)}
    origins: dict[str, set[int]] = {}
    for match in LOAD_PARAMETER.finditer(body):
        if match[2] in number:
            origins.setdefault(match[1], set()).add(number[match[2]])
    steps = [(match[1], REGISTER.findall(match[2])) for match in ASSIGNMENT.finditer(body)]
    changed = True
    while changed:
        changed = False
        for target, sources in steps:
            found = set().union(*(origins.get(source, set()) for source in sources))
            if not found <= origins.get(target, set()):
                origins.setdefault(target, set()).update(found)
                changed = True
    return origins


def _only(arguments: set[int] | None) -> int | None:
    return next(iter(arguments)) if arguments is not None and len(arguments) == 1 else None


FUNCTION = re.compile(r"Compiling entry function '([\w$]+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse_ptxas(text: str) -> dict[str, Resources]:
    """What `ptxas -v` printed, by kernel."""
    found, name, spilled = {}, "", 0
    for line in text.splitlines():
        if match := FUNCTION.search(line):
            name, spilled = match[1], 0
        elif match := SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif (match := USED.search(line)) and name:
            found[name] = Resources(int(match[1]), spilled, int(match[2] or 0))
    return found
