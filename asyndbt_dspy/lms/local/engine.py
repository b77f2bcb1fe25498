"""The engine pair that a `dspy.LM` calls: requests in, responses out, one scheduler behind both."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from concurrent.futures import Future
from threading import Lock
from typing import Any

from dspy.clients.engines.base import validate_request
from dspy.lm15 import (
    ContextLengthError,
    DataPart,
    LM15Error,
    Message,
    Request,
    Response,
    ServerError,
    TextPart,
    TokenLogprob,
    TopLogprob,
    UnsupportedFeatureError,
    Usage,
    response_to_events,
)

from asyndbt_dspy.lms import distributions
from asyndbt_dspy.lms.callers import current_caller
from asyndbt_dspy.lms.local.admission import DEFAULT_RUNNING_TOKENS
from asyndbt_dspy.lms.local.answers import plan_answer
from asyndbt_dspy.lms.local.batching import Scheduler
from asyndbt_dspy.lms.local.decoding import (
    AnswerDecoder,
    CompiledAnswer,
    LabelStep,
    TokenScore,
    compile_answer,
)
from asyndbt_dspy.lms.local.grammar import GrammarFactory
from asyndbt_dspy.lms.local.jobs import Job
from asyndbt_dspy.lms.local.models import LoadedModel
from asyndbt_dspy.lms.local.prompts import PromptEncoder
from asyndbt_dspy.lms.local.sampling import Sampler

# Without max_tokens an answer may be this long.
DEFAULT_MAX_TOKENS = 1024
_REMEMBERED_PLANS = 256
_SUPPORTED_PARAMS = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "max_tokens",
        "response_format",
        "logprobs",
        "top_logprobs",
    }
)


class LocalCore:
    """What the sync and the async engine share: model, scheduler, compiled answers.

    Args:
        loaded: Model and tokenizer.
        name: For messages.
        plain_template: Ignore the tokenizer's chat template.
        deterministic: Whether requests without a seed use a fixed one.
        max_batch_tokens: Bound on the tokens of a pass.
        prefix_cache_tokens: Bound on the prefix cache.
        max_running_tokens: Bound on the memory of running requests.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        name: str,
        plain_template: bool,
        deterministic: bool,
        max_batch_tokens: int,
        prefix_cache_tokens: int,
        max_running_tokens: int = DEFAULT_RUNNING_TOKENS,
    ) -> None:
        self._name = name
        self._deterministic = deterministic
        self._ends = frozenset(loaded.ends)
        self.context_tokens = loaded.decoder.context_tokens
        self._vocabulary = loaded.decoder.vocabulary
        self._encoder = PromptEncoder(loaded.tokenizer, plain=plain_template)
        self._grammars = GrammarFactory(loaded.tokenizer, loaded.decoder.vocabulary, list(loaded.ends))
        self.scheduler = Scheduler(
            loaded.decoder,
            max_batch_tokens=max_batch_tokens,
            prefix_cache_tokens=prefix_cache_tokens,
            max_running_tokens=max_running_tokens,
        )
        # The thread keeps the scheduler alive, and the scheduler the weights: when nobody can call any more, it ends.
        weakref.finalize(self, self.scheduler.stop)
        self._plans: OrderedDict[str, CompiledAnswer] = OrderedDict()
        self._lock = Lock()
        self._count = itertools.count(1)

    def prepare(self, request: Request) -> tuple[Job, Future[Job]]:
        """Check and tokenize a request, and compile its answer; the job is not handed in yet.

        Raises:
            ContextLengthError: The prompt does not fit, or leaves no room for the shortest answer.
            InvalidRequestError: The schema cannot be compiled.
            UnsupportedFeatureError: What the engine has not: tools, content other than text, settings it does not
                know, or probabilities where there is no choice among labels.
        """
        validate_request(request)
        _refuse_unsupported(request)
        prompt = self._encoder.encode(request)
        config = request.config
        answer = self._compiled(config.response_format, prompt.indented)
        _refuse_unmeasured(request, answer)
        room = self.context_tokens - len(prompt.ids)
        seed = config.seed
        if seed is None:
            seed = 0 if self._deterministic or not config.temperature else secrets.randbits(63)
        stops = config.stop + (PromptEncoder.PLAIN_STOPS if self._encoder.plain else ())
        decoder = AnswerDecoder(
            answer=answer,
            grammars=self._grammars,
            sampler=Sampler(
                config.temperature or 0.0, 1.0 if config.top_p is None else config.top_p, config.top_k, seed
            ),
            max_tokens=min(config.max_tokens or DEFAULT_MAX_TOKENS, room),
            ends=self._ends,
            stops=stops,
            top=config.logprobs,
            encode=self._encoder.encode_text,
            vocabulary=self._vocabulary,
        )
        least = max(answer.least_tokens, decoder.next_tokens)
        if room < least:
            raise ContextLengthError(
                f"the prompt has {len(prompt.ids)} tokens and its answer {least} or more, but {self._name} reads at "
                f"most {self.context_tokens} tokens; use fewer or shorter demos, or a model with a longer context"
            )
        future: Future[Job] = Future()
        # From here on only the scheduler settles it: a cancelled task gives up its job, not this future.
        future.set_running_or_notify_cancel()
        caller = current_caller() or config.user_id or ""
        return Job(prompt.ids, prompt.last_turn, decoder, caller, future.set_result), future

    def respond(self, request: Request, job: Job) -> Response:
        """The response of a finished job; records its distributions for the caller.

        Raises:
            LM15Error: What went wrong while the job ran.
        """
        if job.error is not None:
            raise job.error if isinstance(job.error, LM15Error) else _unexpected(job.error)
        answer = job.answer
        for field, probabilities in answer.distributions.items():
            distributions.record(field, probabilities)
        return Response(
            id=f"local-{next(self._count)}",
            model=request.model,
            message=Message.assistant([_answer_part(request, answer)]),
            finish_reason=answer.finish_reason,
            usage=Usage(
                input_tokens=len(job.prompt),
                output_tokens=answer.output_tokens,
                cache_read_tokens=job.cached_tokens,
            ),
            logprobs=tuple(map(_token_logprob, answer.scores))
            if request.config.logprobs is not None
            else None,
            provider_data={distributions.PROVIDER_DATA_KEY: answer.distributions}
            if answer.distributions
            else None,
        )

    @property
    def closed(self) -> bool:
        """Whether the scheduler was stopped for good."""
        return self.scheduler.closed

    def _compiled(self, response_format: Any, indented: bool) -> CompiledAnswer:
        key = json.dumps([response_format, indented])
        with self._lock:
            known = self._plans.get(key)
            if known is not None:
                self._plans.move_to_end(key)
                return known
        compiled = compile_answer(
            plan_answer(response_format, indented=indented), self._encoder, self._grammars
        )
        with self._lock:
            self._plans[key] = compiled
            while len(self._plans) > _REMEMBERED_PLANS:
                self._plans.popitem(last=False)
        return compiled


class _EngineBase(ABC):
    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = True
    supported_params = _SUPPORTED_PARAMS
    greedy_by_default = True
    """Without a temperature the likeliest answer is taken; a rollout cache may share it."""

    def __init__(self, core: LocalCore, settings: dict[str, Any]) -> None:
        self.core = core
        self.context_tokens = core.context_tokens
        self._settings = dict(settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The engine itself: a copied program shares the weights."""
        return self

    def __copy__(self) -> Any:
        return self

    def __reduce__(self) -> Any:
        """As its settings: what reads a pickled LM shares the weights of an equal one, or loads them."""
        return type(self).load_state, (self.dump_state(),)

    @classmethod
    @abstractmethod
    def load_state(cls, state: dict[str, Any]) -> Any:
        """An engine for what `dump_state` returned."""

    def dump_state(self) -> dict[str, Any]:
        """What `load_state` needs to make an equal engine: the arguments of `local_lm`."""
        return dict(self._settings)


class LocalEngine(_EngineBase):
    """`complete` for threads."""

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> LocalEngine:
        """The engine of `local_lm(**state)`; engines loaded from equal states share one model while any is alive."""
        from asyndbt_dspy.lms.local.loading import shared_engines

        return shared_engines(state)[0]

    def complete(self, request: Request) -> Response:
        """Answer one request; blocks until it is done."""
        job, future = self.core.prepare(request)
        self.core.scheduler.submit(job)
        try:
            finished = future.result()
        except BaseException:
            self.core.scheduler.cancel(job)
            raise
        return self.core.respond(request, finished)

    def stream(self, request: Request) -> Any:
        """The events of a complete answer; nothing is sent before it is done."""
        return response_to_events(self.complete(request))

    def close(self) -> None:
        """Stop the engine; requests that are not done get an error."""
        self.core.scheduler.close()


class AsyncLocalEngine(_EngineBase):
    """`complete` for coroutines, on any event loop."""

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncLocalEngine:
        """As `LocalEngine.load_state`."""
        from asyndbt_dspy.lms.local.loading import shared_engines

        return shared_engines(state)[1]

    async def complete(self, request: Request) -> Response:
        """Answer one request; when the task is cancelled, its place in the batch is given up."""
        job, future = self.core.prepare(request)
        self.core.scheduler.submit(job)
        try:
            finished = await asyncio.wrap_future(future)
        except BaseException:
            self.core.scheduler.cancel(job)
            raise
        return self.core.respond(request, finished)

    async def stream(self, request: Request) -> Any:
        """The events of a complete answer; nothing is sent before it is done."""
        for event in response_to_events(await self.complete(request)):
            yield event

    async def aclose(self) -> None:
        """Stop the engine; requests that are not done get an error."""
        await asyncio.to_thread(self.core.scheduler.close)


def _refuse_unsupported(request: Request) -> None:
    config = request.config
    if request.tools:
        raise UnsupportedFeatureError("the local engine does not call tools natively", feature="tools")
    # `store=False` and `effort="off"` ask for what is the case anyway.
    asked: dict[str, Any] = {
        "frequency_penalty": config.frequency_penalty,
        "presence_penalty": config.presence_penalty,
        "service_tier": config.service_tier,
        "store": config.store,
        "reasoning": config.reasoning is not None and config.reasoning.effort != "off",
    }
    asked |= {f"extensions[{name!r}]": True for name in config.extensions or {}}
    for name, value in asked.items():
        if value:
            raise UnsupportedFeatureError(
                f"the local engine has no {name}; leave it out", feature=f"config.{name}"
            )


def _refuse_unmeasured(request: Request, answer: CompiledAnswer) -> None:
    if request.config.probabilities == "required" and not any(
        isinstance(step, LabelStep) and step.field and all(step.labels) for step in answer.steps
    ):
        raise UnsupportedFeatureError(
            "the local engine measures probabilities of object fields with a finite number of values, and the response "
            "schema has none",
            feature="config.probabilities",
        )


def _answer_part(request: Request, answer: AnswerDecoder) -> TextPart | DataPart:
    if request.config.probabilities in (None, "off") or not answer.distributions:
        return TextPart(answer.text)
    measured = {field: labels for field, labels in answer.distributions.items() if field and all(labels)}
    try:
        value = json.loads(answer.text)
    except ValueError:
        return TextPart(answer.text)
    if not measured:
        return TextPart(answer.text)
    return DataPart(value=value, probabilities=measured, method="candidate_sequence_likelihood")


def _token_logprob(score: TokenScore) -> TokenLogprob:
    return TokenLogprob(
        token=score.text,
        logprob=score.log_probability,
        top=tuple(TopLogprob(token=text, logprob=value) for text, value in score.top),
    )


def _unexpected(error: BaseException) -> ServerError:
    wrapped = ServerError(f"the local engine failed on this request: {error!r}")
    wrapped.__cause__ = error
    return wrapped
