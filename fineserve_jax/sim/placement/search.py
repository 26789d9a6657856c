"""Searching for a placement: greedily for any case, exhaustively for small ones."""

import itertools
from collections.abc import Iterable, Iterator

from fineserve_jax.errors import ConfigError
from fineserve_jax.sim.placement.estimate import Estimate, estimate
from fineserve_jax.sim.placement.problem import Placement, Problem, Replica

MOST_PLACEMENTS = 200_000
FEW_DEVICES = 4


def greedy(problem: Problem) -> tuple[Placement, Estimate]:
    """Give each model its first replica, one model after another, then move, add and take away while that helps.

    Each change is the one with the best estimate among all, so that the result is a placement that no single change
    improves. Models are placed in several orders, from the heaviest or the most urgent on and the other way round, and
    once all of them everywhere; the best result counts.

    Raises:
        ConfigError: the models do not all fit, however placed.
    """
    numbers = range(len(problem.models))
    by_weight = sorted(numbers, key=lambda model: problem.models[model].variant(1).weight_bytes)
    by_urgency = sorted(numbers, key=lambda model: problem.models[model].urgency)
    orders = {tuple(order) for base in (by_weight, by_urgency) for order in (base, base[::-1])}
    starts = [_first_replicas(problem, order) for order in sorted(orders)]
    starts.append(tuple(itertools.chain.from_iterable(_everywhere(problem, model) for model in numbers)))
    climbed = (_climb(problem, start) for start in starts)
    placement = max(climbed, key=lambda placement: _score(problem, placement))
    found = estimate(problem, placement)
    if found is None:
        raise _too_large(problem)
    return placement, found


def _climb(problem: Problem, placement: Placement) -> Placement:
    """Change a placement for the best while that improves it."""
    while True:
        improved = max(_neighbours(problem, placement), key=lambda p: _score(problem, p), default=placement)
        if _score(problem, improved) <= _score(problem, placement):
            return placement
        placement = improved


def exhaustive(problem: Problem) -> tuple[Placement, Estimate]:
    """The best placement of all.

    Raises:
        ConfigError: more placements than can be tried, or the models do not all fit.
    """
    choices = [list(_ways(problem, model)) for model in range(len(problem.models))]
    number = 1
    for ways in choices:
        number *= len(ways)
    if number > MOST_PLACEMENTS:
        raise ConfigError(
            f"{number} placements are more than the {MOST_PLACEMENTS} that are tried one by one; use greedy search"
        )
    placements = (tuple(itertools.chain.from_iterable(ways)) for ways in itertools.product(*choices))
    best = max(placements, key=lambda placement: _score(problem, placement))
    found = estimate(problem, best)
    if found is None:
        raise _too_large(problem)
    return best, found


def groups(problem: Problem, model: int) -> Iterator[tuple[int, ...]]:
    """Sets of devices that a replica of the model may be on: of one kind, as many as a degree it allows."""
    for tp in dict.fromkeys(problem.models[model].tp):
        for numbers in itertools.combinations(range(len(problem.devices)), tp):
            if len({problem.devices[number].name for number in numbers}) == 1:
                yield numbers


def _ways(problem: Problem, model: int) -> Iterator[Placement]:
    """All sets of replicas of one model: disjoint, and of one degree."""
    for tp in dict.fromkeys(problem.models[model].tp):
        same = [group for group in groups(problem, model) if len(group) == tp]
        for count in range(1, len(problem.devices) // tp + 1):
            for picked in itertools.combinations(same, count):
                if len({number for group in picked for number in group}) == count * tp:
                    yield tuple(Replica(model, group) for group in picked)


def _first_replicas(problem: Problem, order: Iterable[int]) -> Placement:
    """One replica of each model, in that order, each where the estimate so far is best."""
    placement: Placement = ()
    for model in order:
        candidates = [(*placement, Replica(model, group)) for group in groups(problem, model)]
        placement = max(candidates, key=lambda candidate: _score_of_part(problem, candidate))
    return placement


def _score_of_part(problem: Problem, placement: Placement) -> tuple[float, float]:
    """Score of a placement in which some models have no replica yet: that of the problem without them."""
    numbers = list(dict.fromkeys(replica.model for replica in placement))
    part = Problem(tuple(problem.models[number] for number in numbers), problem.devices, problem.reserve)
    return _score(part, tuple(Replica(numbers.index(replica.model), replica.devices) for replica in placement))


def _neighbours(problem: Problem, placement: Placement) -> Iterator[Placement]:
    """Placements one change away: a replica more, one less, or one elsewhere; two replicas exchanged; a model on as
    many replicas of a degree as there is room for; or if there are few devices, two models anywhere."""
    for model in range(len(problem.models)):
        own = [replica for replica in placement if replica.model == model]
        others = tuple(replica for replica in placement if replica.model != model)
        taken = {number for replica in own for number in replica.devices}
        for group in groups(problem, model):
            new = Replica(model, group)
            if len(group) == len(own[0].devices) and taken.isdisjoint(group):
                yield (*others, *own, new)
            yield (*others, new)
            for replica in own:
                kept = [other for other in own if other is not replica]
                used = {number for other in kept for number in other.devices}
                if all(len(other.devices) == len(group) for other in kept) and used.isdisjoint(group):
                    yield (*others, *kept, new)
        for tp in dict.fromkeys(problem.models[model].tp):
            yield (*others, *_all_over(problem, model, tp))
        if len(own) > 1:
            for replica in own:
                yield (*others, *(other for other in own if other is not replica))
    for one, other in itertools.combinations(placement, 2):
        if one.model != other.model and len(one.devices) == len(other.devices):
            rest = tuple(replica for replica in placement if replica not in (one, other))
            swapped = (*rest, Replica(one.model, other.devices), Replica(other.model, one.devices))
            if _is_disjoint(swapped):
                yield swapped
    if len(problem.devices) <= FEW_DEVICES:
        yield from _pairs_anew(problem, placement)


def _pairs_anew(problem: Problem, placement: Placement) -> Iterator[Placement]:
    """Two models, or the only one, on any sets of devices: often one has to make way for the other to gain."""
    numbers = range(len(problem.models))
    for pair in itertools.combinations(numbers, min(2, len(numbers))):
        others = tuple(replica for replica in placement if replica.model not in pair)
        for ways in itertools.product(*(list(_ways(problem, model)) for model in pair)):
            yield (*others, *itertools.chain.from_iterable(ways))


def _all_over(problem: Problem, model: int, tp: int) -> Placement:
    """Replicas of one degree side by side, on as many devices as they fill."""
    replicas: list[Replica] = []
    used: set[int] = set()
    for group in groups(problem, model):
        if len(group) == tp and used.isdisjoint(group):
            replicas.append(Replica(model, group))
            used.update(group)
    return tuple(replicas)


def _everywhere(problem: Problem, model: int) -> Placement:
    """Replicas of the least degree that has room, on all devices that they fill."""
    placements = (_all_over(problem, model, tp) for tp in sorted(problem.models[model].tp))
    return next((placement for placement in placements if placement), ())


def _is_disjoint(placement: Placement) -> bool:
    """Whether no device holds two replicas of a model."""
    seen = [(replica.model, number) for replica in placement for number in replica.devices]
    return len(set(seen)) == len(seen)


def _score(problem: Problem, placement: Placement) -> tuple[float, float]:
    found = estimate(problem, placement)
    return (-1.0, 0.0) if found is None else found.score


def _too_large(problem: Problem) -> ConfigError:
    total = sum(load.variant(1).weight_bytes for load in problem.models)
    room = sum(device.memory_bytes * (1 - problem.reserve) for device in problem.devices)
    return ConfigError(
        f"the models take {total / 1e9:.1f} GB of weights and do not fit the devices ({room / 1e9:.1f} GB usable) "
        "beside some KV memory; add devices, use narrower weights, or allow a larger tp"
    )
