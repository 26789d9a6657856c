"""An engine in a process of its own: takes a line of JSON for each call, and answers with one.

    python -m benchmarks.peers.worker ENGINE OPTIONS DESCRIPTOR

The answers go to a descriptor of their own, as engines print what they like. This runs in the environments of the
peers, and imports nothing that is not there.
"""

import importlib
import importlib.metadata
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence

Serve = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[float]]]


def main(engine: str, options: str, descriptor: str) -> None:
    module = importlib.import_module(f"benchmarks.peers.engines.{engine}")
    serve: Serve = module.start(**json.loads(options))
    versions = {name: importlib.metadata.version(name) for name in module.VERSIONS_OF}
    with os.fdopen(int(descriptor), "w") as answers:
        for line in sys.stdin:
            asked = json.loads(line)
            times = serve(asked["prompts"], asked["lengths"])
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            print(json.dumps({"times": times, "peak_memory_bytes": peak, "versions": versions}), file=answers)
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
