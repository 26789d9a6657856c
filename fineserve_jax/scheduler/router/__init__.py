"""Which of several engines a request goes to, decided on the host from what each is predicted to give it.

choice     the replica that is predicted to meet the request's targets, and of those the one that is done first
prefixes   what was sent to a replica lately, so that requests that begin alike go where their prefix is cached
router     both, for the replicas of a plan
moves      which requests that still wait would be served sooner elsewhere
"""

from fineserve_jax.scheduler.router.choice import Outlook, choose
from fineserve_jax.scheduler.router.moves import Queue, Waiting, find_moves
from fineserve_jax.scheduler.router.prefixes import SentPrefixes
from fineserve_jax.scheduler.router.router import Asked, Replica, Router

__all__ = ["Asked", "Outlook", "Queue", "Replica", "Router", "SentPrefixes", "Waiting", "choose", "find_moves"]
