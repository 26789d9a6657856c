"""Hugging Face's transformers: prompts of about one length side by side, padded on the left, until all of them end."""

import time
from collections.abc import Sequence

import torch

from benchmarks.peers.worker import Serve

VERSIONS_OF = ("transformers", "torch")


def start(checkpoint: str, max_rows: int, max_tokens: int) -> Serve:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def serve(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[float]]:
        begun = time.perf_counter()
        times: list[list[float]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(prompts), max_rows):
            rows = by_length[first : first + max_rows]
            _serve_rows([prompts[i] for i in rows], [lengths[i] for i in rows], [times[i] for i in rows], begun)
        return times

    def _serve_rows(
        prompts: Sequence[Sequence[int]], lengths: Sequence[int], times: Sequence[list[float]], begun: float
    ) -> None:
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        for step in range(max(lengths)):
            out = model(
                tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            now = time.perf_counter() - begun
            for own, length in zip(times, lengths, strict=True):
                if step < length:
                    own.append(now)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=-1)
            positions = positions[:, -1:] + 1

    return serve
