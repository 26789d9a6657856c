"""The parameters of a converted checkpoint: written by Orbax, and read array by array into the memory they stay in.

Orbax's own restoring holds an array up to three times: as it is stored, decoded, and on the device. Here one stored
piece of it is in memory beside the array itself, which JAX takes as it is where the device is the host.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.params import HostParams, Params
from fineserve_jax.models.row_packing import aligned_empty

_PIECE_BYTES = 4 << 20


def save_params(directory: Path, params: Params) -> None:
    """Writes a parameter tree to a directory that does not exist yet. Raises OSError."""
    # Orbax takes a second to import: only those who use it pay.
    import orbax.checkpoint as ocp

    # Uncompressed: quantised weights shrink by a tenth at most, and start-up would pay for it.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
    in_pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE_BYTES), params)
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.resolve(), args=ocp.args.PyTreeSave(params, save_args=in_pieces))


def read_params(directory: Path, shapes: Params, place: Callable[[str, HostParams], Params]) -> Params:
    """The parameters.

    Args:
        directory: what `save_params` wrote.
        shapes: the tree that is expected, with `jax.ShapeDtypeStruct` leaves.
        place: puts a part of the tree where it belongs, see `Placement.place`.

    Raises:
        ModelLoadError: another tree, shape or dtype is stored, or it cannot be read.
    """
    import orbax.checkpoint as ocp
    import tensorstore as ts

    try:
        with _quiet():
            _check_tree(ocp.PyTreeCheckpointHandler().metadata(directory.resolve()).tree, shapes)
        context = ts.Context({"file_io_concurrency": {"limit": 2}, "data_copy_concurrency": {"limit": 2}})
        read = functools.partial(_read_array, directory.resolve(), context)
        read_part = functools.partial(jax.tree_util.tree_map_with_path, read)
        return {name: place(name, read_part({name: part})[name]) for name, part in shapes.items()}
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"{directory} cannot be restored: {error}; convert the model again") from error


def _check_tree(stored: Params, shapes: Params) -> None:
    """Raises ValueError unless the arrays of these names, and no others, are stored."""
    names = [{jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)} for tree in (stored, shapes)]
    if different := sorted(names[0] ^ names[1]):
        raise ValueError(f"{different[0]} is {'not expected' if different[0] in names[0] else 'missing'}")


def _read_array(directory: Path, context: Any, path: tuple[Any, ...], expected: jax.ShapeDtypeStruct) -> np.ndarray:
    import tensorstore as ts

    name = ".".join(key.key for key in path)
    place = {"driver": "ocdbt", "base": f"file://{directory}/", "path": f"{name}/"}
    stored = ts.open({"driver": "zarr", "kvstore": place}, read=True, context=context).result()
    if stored.shape != expected.shape or stored.dtype.numpy_dtype != expected.dtype:
        found, wanted = (f"{array.dtype.name}{list(array.shape)}" for array in (stored, expected))
        raise ValueError(f"{name} is {found}, {wanted} is expected")
    array = aligned_empty(expected.shape, np.dtype(expected.dtype))
    step: int = np.array(stored.chunk_layout.read_chunk.shape)[0]
    for at in range(0, len(array), step):
        ts.array(array[at : at + step]).write(stored[at : at + step]).result()
    return array


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports every phase through absl's logger; what goes wrong still comes as an exception."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)
