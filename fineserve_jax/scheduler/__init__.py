"""The two-level scheduler: host code only, no jax.

add -> WaitingQueue -level 1, admission (memory)-> RunningRequests -level 2, execution (compute)-> SchedulerOutput
             ^                                          |
             +--------------- preempted ----------------+

Who is admitted first: `policies`, `waiting`. Who gets memory: `admission`, `growth`. Who loses it: `narrowing_policy`,
`victims`, `running`, `swapping`. What a step computes: `model_choice`, `execution`, `chunk_sizes`. Where there are
several engines, `router` says which of them a request goes to.
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
