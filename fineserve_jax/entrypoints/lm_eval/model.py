"""The engine as a model of EleutherAI's lm-evaluation-harness."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fineserve_jax.errors import ConfigError, EngineError, RequestError
from fineserve_jax.llm import LLM
from fineserve_jax.loaders import ChatOptions, render_chat
from fineserve_jax.request.sampling_params import SamplingParams

log = logging.getLogger(__name__)

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""A context and a continuation, None if they are windows of a text, and the tokens of each."""


@register_model("fineserve_jax")
class FineServeLM(TemplateLM):  # type: ignore[misc]
    """A model that the harness can ask for log-likelihoods and texts.

    Args:
        pretrained: what names the model, see `LLM`.
        max_length: most tokens that a token may be predicted from, as the harness's other models have it: requests may
            have one more, the one that is predicted. None: as many as `max_seq_len` allows.
        max_gen_toks: most tokens of a text, where its task says nothing.
        batch_size: most requests that are computed at once; "auto" or 1, the harness's default, is the engine's own
            `max_batch_size`, since results do not depend on it.
        prefix_token_id: stands before texts without context; None: the model's beginning-of-sequence token, or else its
            end-of-sequence token.
        chat_template_args: values for the chat template, such as {"enable_thinking": False}.
        device: what the harness passes on, "cuda:0" if nobody says anything; JAX's choice of a device stands.
        max_batch_size: most requests that are computed at once, with the `batch_size` "auto" or 1.
        settings: of the engine, such as `kv_precision` and `weights`; see `EngineConfig`.

    Raises:
        ConfigError, ModelLoadError: see `LLM`; both `max_length` and `max_seq_len`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        _note_device(device)
        if max_length is not None:
            if "max_seq_len" in settings:
                raise ConfigError("max_length and max_seq_len both say how long a request may be; give one of them")
            settings["max_seq_len"] = max_length + 1
        size = max_batch_size if batch_size in ("auto", 1, "1") else int(batch_size)
        if size is not None:
            settings["max_batch_size"] = size
        self.llm = LLM(pretrained, **settings)
        self.tokenizer = self.llm.tokenizer
        self.max_length = self.llm.engine.max_seq_len - 1
        self.max_gen_toks, self.batch_size = max_gen_toks, batch_size
        self._prefix_token_id, self._chat_template_args = prefix_token_id, dict(chat_template_args or {})
        self._template: str | None = None  # the named one that is used

    # -- tokens --------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token: the one that the tokenizer's files call so, or else the first of them."""
        named = self.tokenizer.special_ids.get(self.tokenizer.special_tokens.get("eos_token", ""))
        return self.tokenizer.eos_token_ids[0] if named is None else named

    @property
    def prefix_token_id(self) -> int:
        """What texts without context are scored behind."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are added as the tokenizer's files say, unless the text begins with them."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token_id
            text = None if begin is None else self.tokenizer.token_text(begin)
            add_special_tokens = text is None or not string.startswith(text)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    # -- chat ----------------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests by that it has made once."""
        return self.llm.engine.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the template that `apply_chat_template` uses, which is noted with results."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            if chat_template not in self.tokenizer.chat_templates:
                known = ", ".join(self.tokenizer.chat_templates) or "none"
                raise RequestError(f"chat_template={chat_template!r} is not the model's; its named ones: {known}")
            self._template = chat_template
            return self.tokenizer.chat_templates[chat_template]
        return self.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, to be answered, or with its last message to be continued."""
        options = ChatOptions(
            chat_template=self._template,
            chat_template_kwargs=self._chat_template_args,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return render_chat(self.tokenizer, chat_history, options)

    # -- what the harness asks -------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy sampling gives.

        Contexts that are too long lose tokens at their beginning.
        """
        most = self.max_length + 1
        contexts = [context[max(0, len(context) + len(own) - most) :] for _, context, own in requests]
        scores = [own for (own,) in self.llm.score(contexts, [[own] for _, _, own in requests])]
        answers = []
        for score, (texts, _, _) in zip(scores, requests, strict=True):
            if score.error is not None:
                raise EngineError(f"{texts!r} cannot be scored: {score.error}")
            answers.append((score.total, score.all_greedy))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows that do not overlap but for a token."""
        windows: list[Encoded] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """A text for each context, up to the first of its stop strings."""
        prompts, params, stops = [], [], []
        for context, gen_kwargs in (request.args for request in requests):
            sampling, stop = self._sampling(gen_kwargs)
            room = self.max_length - (sampling.max_tokens or 0)
            if room < 1:
                raise RequestError(
                    f"max_gen_toks={sampling.max_tokens} leaves no room for a context in max_length={self.max_length}"
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(sampling)
            stops.append(stop)
        texts = []
        for output, stop, request in zip(self.llm.generate(prompts, params), stops, requests, strict=True):
            (sample,) = output.outputs
            if sample.error is not None:
                raise EngineError(f"{request.args[0]!r} cannot be answered: {sample.error}")
            texts.append(postprocess_generated_text(sample.text, stop, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _sampling(self, gen_kwargs: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
        """How to sample, by the keywords of a task, and the strings that end a text."""
        kwargs = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        stop = handle_stop_sequences(kwargs.pop("until", None), eos=self.tokenizer.token_text(self.eot_token_id))
        most = kwargs.pop("max_gen_toks")
        if not kwargs.pop("do_sample"):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("temperature", "top_p", "top_k")}
        return SamplingParams(max_tokens=most, stop=tuple(text for text in stop if text), **kwargs), stop


def _note_device(device: str | None) -> None:
    """Says so if a device is named that JAX does not use. The harness names one by itself, so that is no error."""
    used = jax.default_backend()
    if device is not None and device.partition(":")[0] not in (used, "cuda" if used == "gpu" else used):
        log.warning("device=%r counts for nothing: JAX uses %s; JAX_PLATFORMS chooses another one", device, used)
