"""Several engines behind one front door: a plan says what each serves and on which devices, a router who gets which
request.

plan      the file form of a placement, checked
replica   an engine as the router sees it
fleet     engines of a plan that are asked, and served from, as if they were one
balancer  requests that wait are moved away from engines that are short of memory
"""

from fineserve_jax.fleet.fleet import Fleet
from fineserve_jax.fleet.load import load_fleet, only_engine, open_engines
from fineserve_jax.fleet.plan import EnginePlan, Plan, read_plan

__all__ = ["EnginePlan", "Fleet", "Plan", "load_fleet", "only_engine", "open_engines", "read_plan"]
