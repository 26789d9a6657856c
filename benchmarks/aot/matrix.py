"""Every case of a platform."""

from benchmarks.aot.attention_cases import attention_cases
from benchmarks.aot.cases import Case
from benchmarks.aot.step_cases import step_cases
from benchmarks.aot.targets import Platform
from benchmarks.aot.writing_cases import writing_cases


def all_cases(platform: Platform, full: bool = False) -> list[Case]:
    """Every case of a platform; `full`: with formats by themselves at the shapes of every model."""
    return [*attention_cases(platform, full), *writing_cases(platform, full), *step_cases(platform)]
