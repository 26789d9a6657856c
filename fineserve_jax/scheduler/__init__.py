"""The two-level scheduler: host code only, no jax.

add -> WaitingQueue -level 1, admission (memory)-> rows -level 2, execution (compute)-> SchedulerOutput -> commit
             ^                                      |
             +--------- preempted, to recompute ----+
"""

from fineserve_jax.scheduler.costs import FormatCost, ModelCost, StepCost
from fineserve_jax.scheduler.devices import DeviceRoofline
from fineserve_jax.scheduler.policies import POLICIES, Policy, PolicyContext
from fineserve_jax.scheduler.profile import StepProfile, load_profiles, save_profiles
from fineserve_jax.scheduler.scheduler import Scheduler
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig

__all__ = [
    "POLICIES",
    "DeviceRoofline",
    "FormatCost",
    "ModelCost",
    "Policy",
    "PolicyContext",
    "Scheduler",
    "SchedulerConfig",
    "StepCost",
    "StepProfile",
    "load_profiles",
    "save_profiles",
]
