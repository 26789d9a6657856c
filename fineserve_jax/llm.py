"""The synchronous front door: prompts in, answers out, in order."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from fineserve_jax.engine.calls import Call, Generation
from fineserve_jax.engine.embedding import Embedding, PromptEmbedding
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.intake import Conversation, Prompt, chat_encoder, ticket_for_pieces
from fineserve_jax.engine.iteration import PromptSource, outputs_as_they_come
from fineserve_jax.engine.new_weights import WeightSource
from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.engine.prompts import conversation_list, encode_prompt, prompt_list
from fineserve_jax.engine.scoring import Completion, CompletionScore, Scoring, completion_lists
from fineserve_jax.engine.stats import EngineStats, joint_stats
from fineserve_jax.engine.tickets import Inbox, Ticket
from fineserve_jax.errors import RequestError
from fineserve_jax.fleet import Fleet, Plan, only_engine, open_engines
from fineserve_jax.loaders import ChatOptions, Tokenizer
from fineserve_jax.request.request_options import OptionKeywords, RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

T = TypeVar("T")


class LLM:
    """A model, or several, that answer prompts, each with its KV cache in the precision it asks for.

    >>> llm = LLM("smollm2-135m", kv_precision="int8", kv_memory="256MiB")
    >>> outs = llm.generate(["The sky is", "Grass is"], SamplingParams(max_tokens=8), kv_precision=["int4", "bf16"])
    >>> outs[0].outputs[0].text

    Several models share the KV memory, and then each prompt names its model:

    >>> llm = LLM(models={"exact": "smollm2-135m", "fast": {"model": "smollm2-135m", "weights": "int8"}})
    >>> llm.generate(["The sky is", "Grass is"], model=["exact", "fast"])

    Threads may call it at once, and are served together. An interrupt ends a call, frees what it held, and leaves all
    else as it is. `close`, or leaving a `with` block, ends the thread that computes; a process that exits does, too.

    Args:
        model: an alias, a .gguf file, a Hugging Face directory, or a directory that `fineserve-jax convert` wrote.
        models: instead of `model`, several by name: each such a source, or a table of `model` and, where they differ
            from the settings, `weights`, `kv_precision` and `max_seq_len`.
        plan: instead of both and of settings, a YAML file, or a `Plan`, that says what several engines serve and on
            which devices (see docs/plans.md); or a `Fleet` of engines that run already.
        settings: the fields of `EngineConfig`.

    Attributes:
        intake: what is asked: the engine, or those of the plan.
        loop: what serves.

    Raises:
        ModelLoadError: a model that cannot be found, read or used.
        ConfigError: a setting that is unknown or cannot be honoured.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        models: Mapping[str, Any] | None = None,
        plan: str | Path | Plan | Fleet | None = None,
        **settings: Any,
    ) -> None:
        self.intake, self.loop = open_engines(model, models, plan, settings)
        weakref.finalize(self, self.loop.close_without_waiting).atexit = False  # the loop sees to that itself

    @property
    def tokenizer(self) -> Tokenizer:
        """The only model's; those of several are in `intake.models`."""
        return self.intake.served().tokenizer

    @property
    def engine(self) -> Engine:
        """The only engine; its own methods are for the loop's thread, but for `prepare`. Raises `EngineError` if there
        are several, by a plan."""
        return only_engine(self.intake)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        *,
        on_step: Callable[[EngineStats], None] | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[RequestOutput]:
        """Answers prompts, all in one batch as far as memory allows.

        Args:
            prompts: texts, lists or arrays of token ids, or tables {"prompt": text} or {"prompt_token_ids": ids}; in a
                list or a generator; or a single one.
            sampling_params: one for all, or one for each prompt; greedy if None.
            options: who answers, in which KV precision, how soon: one for all, or one for each prompt.
            on_step: called with the newest statistics after every step, to show progress; a call that takes longer than
                a step misses some.
            fields: of `RequestOptions`, those that `options` leaves unset: each one for all, or one for each prompt.

        Returns:
            an output for each prompt, in the order of the prompts. Where a model computed NaN or infinity, an answer
            cannot go on as its `structured_outputs` ask, or steps failed again and again, the sample's `finish_reason`
            is "error", and its `error` says more; the others go on.

        Raises:
            RequestError: before anything is computed, naming the first prompt that cannot be served.
            EngineError: the engine is closed, or cannot go on.
        """
        listed = prompt_list(prompts)
        return self._served(Generation(listed, encode_prompt, sampling_params, options, fields), on_step)

    def chat(
        self,
        conversations: Conversation | Iterable[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        *,
        chat_options: ChatOptions | None = None,
        on_step: Callable[[EngineStats], None] | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[RequestOutput]:
        """Continues conversations, lists of {"role": ..., "content": ...}, through the model's chat template.

        Otherwise as `generate`; also raises `RequestError` for malformed messages or a model without a template.

        Args:
            chat_options: how they are rendered: tools, documents, which template, and so on.
        """
        listed, encode = conversation_list(conversations), chat_encoder(chat_options)
        return self._served(Generation(listed, encode, sampling_params, options, fields), on_step)

    def score(
        self,
        prompts: Prompt | Iterable[Prompt],
        completions: Sequence[Completion] | Sequence[Sequence[Completion]],
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[list[CompletionScore]]:
        """Log-probabilities of completions that are given, each after its prompt.

        What completions of a prompt have in common is computed once (`prefix_cache`), and nothing is sampled.

        >>> ((blue, green),) = llm.score("The sky is", [" blue", " green"])
        >>> blue.total - green.total

        Args:
            prompts: as `generate` takes them.
            completions: texts or token ids: of a single prompt its completions, of several a list of them for each. A
                text's tokens are those that it has behind its prompt's text.
            options, fields: as of `generate`, for each prompt.

        Returns:
            for each prompt, in order, a score for each of its completions. What cannot be computed has an `error`.

        Raises:
            RequestError: before anything is computed, naming the first prompt and completion that cannot be scored.
            EngineError: the engine is closed, or cannot go on.
        """
        return self._served(Scoring(*completion_lists(prompts, completions), options, fields))

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[PromptEmbedding]:
        """Vectors of prompts: the model's last hidden states, behind its final norm, pooled.

        They are computed through the KV cache as requests keep it, in chunks, however long a prompt is.

        Args:
            prompts: as `generate` takes them; they may be as long as `max_seq_len`.
            options, fields: as of `generate`.
            pooling: "mean" of all tokens, which are then not taken from the prefix cache, or the "last" token's alone;
                None: what the model is made for, see docs/scores.md.
            normalize: scale vectors to length 1; None: if the model is made so.

        Returns:
            a vector for each prompt, in order. What cannot be computed has an `error`.

        Raises:
            RequestError: before anything is computed, another `pooling`, or naming the first prompt without a vector.
            EngineError: the engine is closed, or cannot go on.
        """
        return self._served(Embedding(prompt_list(prompts), pooling, normalize, options, fields))

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        chat_options: ChatOptions | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> Iterator[str]:
        """Yields the answer to one prompt, or to one conversation, piece by piece.

        Leaving the loop early ends the request. Raises `RequestError` at once, not at the first piece. Behind the last
        piece, raises `NonFiniteError` if the model computes NaN or infinity, `DeadEndError` if the answer cannot go on
        as its `structured_outputs` ask, and `EngineError` if its steps fail.

        Args:
            chat_options: how a conversation is rendered; not for a prompt, which is taken as it is.
        """
        self.loop.check_usable()
        inbox = Inbox()
        ticket = ticket_for_pieces(self.intake, inbox, prompt, sampling_params, options, chat_options, fields)
        return self._pieces(ticket, inbox)

    def generate_iter(
        self,
        prompts: Iterable[Prompt | Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        options: RequestOptions | Iterable[RequestOptions] | None = None,
        *,
        ordered: bool = False,
        look_ahead: int | None = None,
        chat_options: ChatOptions | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> Iterator[RequestOutput]:
        """Yields the outputs of any number of prompts, each as soon as it is complete; they may go on for ever.

        Prompts are asked for as outputs are taken, so that neither they nor the outputs pile up: a source that waits
        makes the outputs wait, too. Leaving the loop early aborts what is under way. A prompt that cannot be served
        has an output with the `finish_reason` "error"; whatever `prompts` raises ends the iteration.

        Args:
            prompts: texts, token ids, tables or conversations, as `generate` and `chat` take them.
            sampling_params, options: one for all, or an iterable with one for each prompt, asked for along with it.
            ordered: give outputs out in the order of the prompts, instead of as they are complete; `index` of an output
                is the number of its prompt either way.
            look_ahead: most prompts that were asked for and whose outputs were not taken; None: five times
                `max_batch_size`.
            chat_options: how conversations are rendered.
            fields: of `RequestOptions`, those that `options` leave unset, one for all prompts.

        Raises:
            RequestError: at once, for a bad `look_ahead` or keyword.
            EngineError: the engine is closed, or cannot go on.
        """
        self.loop.check_usable()
        source = PromptSource(self.intake, prompts, sampling_params, options, chat_options, fields)
        most = 5 * self.intake.max_batch_size if look_ahead is None else look_ahead
        if most < 1:
            raise RequestError(f"look_ahead={most}: at least 1 prompt is to be asked for")
        return outputs_as_they_come(self.loop, source, most, ordered)

    def warm_up(
        self,
        kv_precisions: Sequence[str] = (),
        min_kv_precision: str | None = None,
        *,
        structured_outputs: bool = False,
        prompt_logprobs: bool = False,
    ) -> int:
        """Compiles ahead all programs that requests in these KV formats, and in each model's own, can need; see
        `Engine.warm_up`."""
        return sum(
            self.loop.each(
                lambda engine: engine.warm_up(
                    kv_precisions,
                    min_kv_precision,
                    structured_outputs=structured_outputs,
                    prompt_logprobs=prompt_logprobs,
                )
            )
        )

    def load_model(
        self, name: str, source: str | Path | Mapping[str, Any], *, engines: Sequence[int] | None = None
    ) -> None:
        """Serves a further model out of the same KV memory; others are served meanwhile.

        >>> llm.load_model("fast", {"model": "smollm2-135m", "weights": "int8"})

        Args:
            name: what requests call it.
            source: an alias or a path, or a table, as an entry of `models`.
            engines: which engines of a plan are to have it, by their numbers from 0; all of them have it, or none.

        Raises:
            ConfigError: a name in use, settings that cannot be honoured, weights for which there is no memory, or pages
                that do not fit the memory as it was divided at the start.
            ModelLoadError: a model that cannot be found, read or used.
        """
        self.loop.load_model(name, source, engines)

    def unload_model(self, name: str, *, abort: bool = False) -> None:
        """Serves a model no longer: its weights are dropped, and its KV memory is free for others.

        Its requests that are under way are answered before, and those that come meanwhile raise `RequestError`; others
        are served as ever.

        Args:
            abort: end its requests instead, with the finish reason "abort".

        Raises:
            RequestError: no such model, or one that is being unloaded.
        """
        self.loop.unload_model(name, abort=abort)

    def update_params(self, source: WeightSource, model: str | None = None, *, abort: bool = False) -> None:
        """Gives a model new weights of the same shapes between two steps, as reinforcement learning does; nothing is
        compiled for it, and matrices are encoded in the precision of those it has.

        Requests that are under way are answered before, by the old weights, and those that come meanwhile afterwards,
        by the new ones. What the prefix cache holds is forgotten. An update that fails changes nothing.

        Args:
            source: what names a model of the same configuration; tensors by the names of Hugging Face's checkpoints; or
                a tree of parameters, as `LoadedModel` has it, in the same precision or in floats.
            model: whose weights; None for the only one there is.
            abort: end what is under way instead, with the finish reason "abort".

        Raises:
            ModelLoadError: a source that cannot be found or read, or whose tensors are not the model's.
            ConfigError: a model of another configuration.
        """
        self.loop.each_when_idle(lambda engine: engine.update_params(source, model), model, abort=abort)

    def sleep(self, *, drop_weights: bool = False, abort: bool = False) -> None:
        """Gives the memory of keys and values, and of weights on an accelerator, back until `wake_up`.

        Requests that are under way are answered before; those that come meanwhile raise `EngineError`.

        Args:
            drop_weights: do not keep the weights in host memory, since `update_params` will give others.
            abort: end what is under way instead, with the finish reason "abort".
        """
        self.loop.each_when_idle(lambda engine: engine.sleep(drop_weights=drop_weights), abort=abort)

    def wake_up(self) -> None:
        """Takes the memory again that `sleep` gave back. Raises `EngineError` if the weights were dropped, and none
        given since."""
        self.loop.each(Engine.wake_up)

    def stats(self) -> EngineStats:
        """KV bytes per format, running and waiting requests, tokens per second, compilations, preemptions; of all
        engines together."""
        return joint_stats(self.loop.each(Engine.stats))

    def close(self) -> None:
        """Ends the thread that computes; calls that wait, and later ones, raise `EngineError`."""
        self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _pieces(self, ticket: Ticket, inbox: Inbox) -> Iterator[str]:
        # Runs from the first piece asked for: a stream that nobody reads holds nothing.
        self.loop.abort_with(inbox, [ticket])
        try:
            self.loop.submit([ticket])
            is_done = False
            while not is_done:
                inbox.wait()
                piece, is_done = ticket.take()
                if piece:
                    yield piece
            ticket.check()
        finally:
            self.loop.abort([ticket])

    def _served(self, call: Call[T], on_step: Callable[[EngineStats], None] | None = None) -> T:
        """Prepares all that a call asks for, then waits until it is served. Nothing stays behind, whatever happens."""
        self.loop.check_usable()
        inbox = Inbox(wants_stats=on_step is not None)
        tickets = call.tickets(self.intake, inbox)
        self.loop.abort_with(inbox, tickets)
        try:
            self.loop.submit(tickets)
            num_left = len(tickets)
            while num_left:
                num_left -= len(inbox.wait())
                if on_step is not None and (stats := inbox.take_stats()) is not None:
                    on_step(stats)
        finally:
            self.loop.abort(tickets)
        return call.result(tickets)
