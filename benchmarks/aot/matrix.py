"""Every case of a platform."""

from collections.abc import Mapping, Sequence

from benchmarks.aot.attention_cases import attention_cases
from benchmarks.aot.cases import Case
from benchmarks.aot.results import Result
from benchmarks.aot.step_cases import step_cases
from benchmarks.aot.targets import TARGETS, Platform
from benchmarks.aot.writing_cases import writing_cases


def all_cases(platform: Platform, full: bool = False) -> list[Case]:
    """Every case of a platform; `full`: with formats by themselves at the shapes of every model."""
    return [*attention_cases(platform, full), *writing_cases(platform, full), *step_cases(platform)]


def in_order(found: Mapping[tuple[str, str], Result], platform: Platform, cases: Sequence[Case]) -> list[Result]:
    """Results, by `Result.key`, in the order of cases and chips, without those of cases that there are no more."""
    keys = [(target.name, case.title) for case in cases for target in TARGETS[platform]]
    return [found[key] for key in keys if key in found]
