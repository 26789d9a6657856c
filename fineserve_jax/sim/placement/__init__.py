"""Which model goes on which devices: decided above engines, before any of them starts.

problem    what is asked: models with rates, lengths and targets, and devices
estimate   what a placement would give, by queueing formulas
search     greedy search, and an exhaustive one for small cases
rules      the rules of others, for comparison
"""

from fineserve_jax.sim.placement.estimate import Estimate, estimate
from fineserve_jax.sim.placement.problem import ModelLoad, Placement, Problem, Replica, read_problem
from fineserve_jax.sim.placement.rules import prism, slab_aware
from fineserve_jax.sim.placement.search import exhaustive, greedy

__all__ = [
    "Estimate",
    "ModelLoad",
    "Placement",
    "Problem",
    "Replica",
    "estimate",
    "exhaustive",
    "greedy",
    "prism",
    "read_problem",
    "slab_aware",
]
