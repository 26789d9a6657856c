"""A pipeline of Ray Data over several machines: rows of JSON lines in, Parquet with their answers out.

On the first machine `ray start --head`, on each other `ray start --address FIRST:6379`, all with the same packages
(`pip install 'fineserve-jax[cuda12,ray]'`) and folders that all of them see. Then, on any of them:

    python examples/ray_pipeline.py --input /shared/prompts.jsonl --output /shared/answers --engines 8 --gpus 1

Rows need a column "id" and a "prompt", and may have any field of a row of `fineserve-jax batch`. Run again after an
interruption, it goes on: Ray keeps the ids of the rows that are written. On one machine without GPUs, leave out
`--engines` and `--gpus`; if it has only two cores, give `--cpus 0`, since Ray wants one to read rows and, to go on,
one to pass over those that are written.
"""

import argparse
import os

import ray
from ray.data.checkpoint import CheckpointConfig

from fineserve_jax import FineServePredictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="a file, a folder or a pattern of JSON lines")
    parser.add_argument("--output", required=True, help="a folder for Parquet files")
    parser.add_argument("--model", default="smollm2-135m", help="alias, or a path that all machines have")
    parser.add_argument("--engines", type=int, default=1, help="how many, over all machines")
    parser.add_argument("--gpus", type=float, default=0.0, help="that each engine takes")
    parser.add_argument("--cpus", type=float, default=1.0, help="that each engine takes, in Ray's books")
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    output = os.path.abspath(arguments.output)

    ray.init(ignore_reinit_error=True)  # joins the cluster that RAY_ADDRESS names, or that this machine belongs to
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=f"{output}.checkpoint", delete_checkpoint_on_success=False
    )

    answers = ray.data.read_json(arguments.input).map_batches(
        FineServePredictor,
        fn_constructor_kwargs={
            "model": arguments.model,
            "sampling": {"max_tokens": arguments.max_tokens},
            "kv_precision": "int8",
        },
        batch_size=256,  # handed to an engine at once; it serves as many of them together as its memory holds
        compute=ray.data.ActorPoolStrategy(size=arguments.engines),
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
    )
    answers.write_parquet(output)


if __name__ == "__main__":
    main()
