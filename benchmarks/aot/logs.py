"""What is logged of a run, in each of its processes."""

import logging

NOISY = ("jax", "absl", "asyncio")  # they miss the chips


def log_from(level: int) -> None:
    logging.basicConfig(level=level)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
