"""llama.cpp, by llama-cpp-python's bindings of its batch interface.

Prompts are served as llama.cpp's server does it: so many at a time as there are sequences, a prompt that waits taking
the place of one that has ended; a step decodes a token of each, and computes prompts as far as the batch has room.
"""

import ctypes
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.peers.worker import Serve

VERSIONS_OF = ("llama-cpp-python",)
BATCH_TOKENS = 2048  # llama.cpp's default
CACHE_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}


def start(file: str, cache_type: str, max_rows: int, max_tokens: int) -> Serve:
    """`file`: GGUF. `cache_type`: of keys and values."""
    threads = len(os.sched_getaffinity(0))
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_QUIET, None)
    of_model = llama_cpp.llama_model_default_params()
    if hasattr(of_model, "use_extra_bufts"):
        of_model.use_extra_bufts = "amx_tile" not in Path("/proc/cpuinfo").read_text()  # whose path for AMX crashes
    model = llama_cpp.llama_model_load_from_file(file.encode(), of_model)
    of_context = llama_cpp.llama_context_default_params()
    of_context.n_ctx, of_context.n_seq_max, of_context.n_batch = max_rows * max_tokens, max_rows, BATCH_TOKENS
    of_context.n_threads = of_context.n_threads_batch = threads
    of_context.type_k = of_context.type_v = CACHE_TYPES[cache_type]
    context = llama_cpp.llama_init_from_model(model, of_context)
    if not context:
        raise RuntimeError(f"llama.cpp makes no context for {file} with a cache in {cache_type}")
    return _Server(model, context, max_rows).serve


@llama_cpp.llama_log_callback
def _QUIET(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Keeps its messages to itself."""


class _Slot:
    """A prompt in one of the sequences: `done` of its tokens are computed."""

    def __init__(self, prompt: Sequence[int], length: int, times: list[float]) -> None:
        self.tokens, self.length, self.times, self.done = list(prompt), length, times, 0


class _Server:
    def __init__(self, model: object, context: object, max_rows: int) -> None:
        self.context, self.max_rows = context, max_rows
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.memory = llama_cpp.llama_get_memory(context)
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def serve(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[float]]:
        begun = time.perf_counter()
        times: list[list[float]] = [[] for _ in prompts]
        waiting = deque(_Slot(*each) for each in zip(prompts, lengths, times, strict=True))
        slots: dict[int, _Slot] = {}
        while waiting or slots:
            for sequence in range(self.max_rows):
                if sequence not in slots and waiting:
                    slots[sequence] = waiting.popleft()
            sampled = self._compute(slots)
            now = time.perf_counter() - begun
            for sequence, token in sampled.items():
                slot = slots[sequence]
                slot.tokens.append(token)
                slot.times.append(now)
                if len(slot.times) == slot.length:
                    llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)
                    del slots[sequence]
        return times

    def _compute(self, slots: dict[int, _Slot]) -> dict[int, int]:
        """One batch: the likeliest next token of each sequence whose tokens are all computed."""
        batch, count, last = self.batch, 0, {}
        # Those that decode first, so that prompts cannot take their room.
        for sequence, slot in sorted(slots.items(), key=lambda item: len(item[1].tokens) - item[1].done > 1):
            for token in slot.tokens[slot.done : slot.done + BATCH_TOKENS - count]:
                batch.token[count], batch.pos[count] = token, slot.done
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                slot.done += 1
                batch.logits[count] = slot.done == len(slot.tokens)
                if batch.logits[count]:
                    last[sequence] = count
                count += 1
        batch.n_tokens = count
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gives {status}")
        return {sequence: self._likeliest(index) for sequence, index in last.items()}

    def _likeliest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocab_size,))))
