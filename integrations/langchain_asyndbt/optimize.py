"""``optimize_chain``: the same chain with better prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dspy
from langchain_core.runnables import Runnable

from asyndbt_dspy import AsynDBT, Worker
from asyndbt_dspy.errors import ConfigurationError
from langchain_asyndbt.chain_program import AMBIENT_SETTING, ChainProgram, to_program
from langchain_asyndbt.datasets import ExampleForm, example_form, infer_labels, warn_of_unwritable
from langchain_asyndbt.fields import output_field
from langchain_asyndbt.metrics import as_dspy_metric

OnDone = Callable[[AsynDBT, ChainProgram], None]


def optimize_chain(
    chain: Runnable[Any, Any],
    *,
    metric: Callable[..., Any],
    trainset: Sequence[Any] | None = None,
    valset: Sequence[Any] | None = None,
    workers: int | Sequence[Worker] | None = None,
    labels: Sequence[str] | None = None,
    input_keys: Sequence[str] | None = None,
    input_key: str | None = None,
    output_key: str | None = None,
    on_done: OnDone | None = None,
    **optimizer_options: Any,
) -> Runnable[Any, Any]:
    """Optimize the instructions and demos of a chain's prompts.

    Args:
        chain: ``prompt | model | parser``, or several of them with other steps between. Not changed.
        metric: DSPy's form ``(gold, prediction)``, where ``prediction.output`` is the chain's output, or an
            evaluator of LangSmith: ``(run, example)`` or ``(inputs, outputs, reference_outputs)``. Higher is
            better.
        trainset: Dictionaries, ``{"inputs": …, "outputs": …}``, LangSmith's examples or ``dspy.Example``. May be
            left out where ``workers`` bring their own.
        valset: Examples for the final comparison; else a part of ``trainset`` is kept back.
        workers: A number, or ``asyndbt_dspy.Worker`` objects with examples in any of these forms, or without (they get parts
            of ``trainset``). A worker without an LM asks the chain's own models; ``Worker(lm=langchain_lm(model))``
            asks another one.
        labels: The answers where they are an enumeration; default: found out from ``trainset``. Only where the chain's
            output is its last prompt's answer, or a dictionary with the answer of one prompt.
        input_keys: Names of the inputs in plain dictionaries; default: what the chain's schema says.
        input_key: Where the chain's input is no dictionary: the example's field that is passed to it.
        output_key: The output field that the chain should give; default: the only one.
        on_done: Called with the optimizer (its ``result``) and the optimized program.
        **optimizer_options: Of ``AsynDBT``: ``auto``, ``budget``, ``seed``, ….

    Returns:
        The chain with optimized prompts, of the same types, with the same config, tags and models; the chain's
        own prompts where nothing beat them.

    Raises:
        ExportError: the chain has no prompt before a model, or a prompt that cannot take demos.
        ConfigurationError: examples or options that cannot work; before any call of a model.
    """
    job = _prepare(chain, metric, trainset, valset, workers, labels, input_keys, input_key, output_key)
    _check_instructions(job.program, optimizer_options.get("instructions"))
    optimizer = AsynDBT(metric=job.metric, **{**job.options, **optimizer_options})
    with job.context():
        program = optimizer.compile(job.program, trainset=job.trainset, valset=job.valset)
    return _finished(optimizer, program, on_done)


async def aoptimize_chain(
    chain: Runnable[Any, Any],
    *,
    metric: Callable[..., Any],
    trainset: Sequence[Any] | None = None,
    valset: Sequence[Any] | None = None,
    workers: int | Sequence[Worker] | None = None,
    labels: Sequence[str] | None = None,
    input_keys: Sequence[str] | None = None,
    input_key: str | None = None,
    output_key: str | None = None,
    on_done: OnDone | None = None,
    **optimizer_options: Any,
) -> Runnable[Any, Any]:
    """``optimize_chain`` as a coroutine of the running event loop."""
    job = _prepare(chain, metric, trainset, valset, workers, labels, input_keys, input_key, output_key)
    _check_instructions(job.program, optimizer_options.get("instructions"))
    optimizer = AsynDBT(metric=job.metric, **{**job.options, **optimizer_options})
    with job.context():
        program = await optimizer.acompile(job.program, trainset=job.trainset, valset=job.valset)
    return _finished(optimizer, program, on_done)


@dataclass(frozen=True)
class _Job:
    program: ChainProgram
    metric: Callable[..., Any]
    trainset: list[dspy.Example] | None
    valset: list[dspy.Example] | None
    options: dict[str, Any]
    uses_ambient: bool

    @contextmanager
    def context(self) -> Iterator[None]:
        """The LM of ``dspy.configure`` may serve metrics and proposals; it does not replace the chain's models."""
        ambient = None if self.uses_ambient else dspy.settings.lm
        with dspy.context(**{AMBIENT_SETTING: ambient}):
            yield


def _prepare(
    chain: Runnable[Any, Any],
    metric: Callable[..., Any],
    trainset: Sequence[Any] | None,
    valset: Sequence[Any] | None,
    workers: int | Sequence[Worker] | None,
    labels: Sequence[str] | None,
    input_keys: Sequence[str] | None,
    input_key: str | None,
    output_key: str | None,
) -> _Job:
    plan = to_program(chain).plan
    form = example_form(plan, input_keys=input_keys, input_key=input_key, output_key=output_key)
    listed = list(workers) if isinstance(workers, Sequence) else []
    if trainset is None and not listed:
        raise ConfigurationError("give a trainset, or workers that bring their own")
    train = form.examples(trainset) if trainset is not None else None
    converted = [_converted(worker, form) for worker in listed]
    known = [*(train or ()), *(example for worker in converted for example in worker.shard)]
    if not labels and len(plan.output_keys) == 1:
        labels = infer_labels(known, output_field(plan.output_keys[0]))
    program = to_program(chain, labels=labels, input_key=input_key)
    warn_of_unwritable(program.plan, known)
    # A chain's own template shows demos as it shows the last turn; what DSPy's adapters add is none of its business.
    options: dict[str, Any] = {"demo_ending": False}
    if workers is not None:
        options["workers"] = converted if listed else workers
    return _Job(
        program=program,
        metric=as_dspy_metric(metric),
        trainset=train,
        valset=form.examples(valset) if valset is not None else None,
        options=options,
        uses_ambient=any(worker.lm is not None and worker.lm is dspy.settings.lm for worker in listed),
    )


def _check_instructions(program: ChainProgram, texts: Mapping[str, Sequence[str]] | None) -> None:
    """Refuse texts of the user that leave out a variable of the chain's own; what else is wrong AsynDBT says."""
    for name, listed in (texts or {}).items():
        predictor = program.plan.predictors.get(name)
        if predictor is None or isinstance(listed, str):
            continue
        for text in listed:
            lacking = predictor.adapter.lacking(text) if isinstance(text, str) else []
            if lacking:
                raise ConfigurationError(
                    f"instructions for {name!r} leave out the variables {lacking} of the chain's prompt: {text[:80]!r}"
                )


def _converted(worker: Worker, form: ExampleForm) -> Worker:
    valset = form.examples(worker.valset) if worker.valset is not None else None
    trainset = form.examples(worker.trainset) if worker.trainset is not None else None
    return dataclasses.replace(worker, trainset=trainset, valset=valset)


def _finished(optimizer: AsynDBT, program: Any, on_done: OnDone | None) -> Runnable[Any, Any]:
    if on_done is not None:
        on_done(optimizer, program)
    chain: Runnable[Any, Any] = program.to_chain()
    return chain
