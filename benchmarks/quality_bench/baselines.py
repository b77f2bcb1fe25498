"""The paper's baselines. Those that choose demos anew for each input, and the classifier, are shown but not ranked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np

from asyndbt_dspy.lms import distributions
from quality_bench import embeddings
from quality_bench.tasks import Task

if TYPE_CHECKING:
    from quality_bench.optimizers import Job, Outcome


def _outcome(program: dspy.Module, **settings: Any) -> Outcome:
    from quality_bench.optimizers import Outcome

    return Outcome(program, settings)


def _manual_prompt(job: Job) -> Outcome:
    """Instructions that a person wrote, at the predictor that gives the label."""
    program = job.task.build()
    program.predictors()[-1].signature = program.predictors()[-1].signature.with_instructions(job.task.manual)
    return _outcome(program)


def with_reasoning(task: Task) -> dspy.Module:
    """The student with a reasoning before the label."""
    program = task.build()
    if isinstance(program, dspy.Predict):
        return dspy.ChainOfThought(program.signature)
    for name, one in list(program.named_predictors()):
        if "label" in one.signature.output_fields:
            setattr(program, name, dspy.ChainOfThought(one.signature))
    return program


def _zero_shot_cot(job: Job) -> Outcome:
    """A reasoning before the label (``dspy.ChainOfThought``), without demos."""
    return _outcome(with_reasoning(job.task))


def demos_per_prompt(task: Task) -> int:
    """Demos of the in-context baselines: as many as classes, as in the paper, but at least four."""
    return max(4, len(task.labels))


def _with_demos(task: Task, demos: Sequence[dspy.Example]) -> dspy.Module:
    """A student with these labelled demos at every predictor, as ``dspy.LabeledFewShot`` sets them."""
    program = task.build()
    for predictor in program.predictors():
        predictor.demos = list(demos)
    return program


def _random_icl(job: Job) -> Outcome:
    """Random demos of any class."""
    count = demos_per_prompt(job.task)
    drawn = random.Random(job.seed).sample(job.examples.train, count)
    return _outcome(_with_demos(job.task, drawn), demos=count)


class Nearest(dspy.Module):
    """Answers every input with the nearest of some examples as demos, the nearest last (KATE)."""

    def __init__(self, task: Task, examples: Sequence[dspy.Example], count: int) -> None:
        super().__init__()
        self._task, self._examples, self._count = task, list(examples), count
        self._vectors = embeddings.embed([embeddings.text_of(one, task.inputs) for one in examples])

    def named_predictors(self) -> list[Any]:
        return []  # its demos are of one input: there is no state to keep

    def forward(self, **inputs: Any) -> dspy.Prediction:
        [vector] = embeddings.embed([" ".join(str(inputs[name]) for name in self._task.inputs)])
        nearest = np.argsort(self._vectors @ vector, kind="stable")[-self._count :]
        return _with_demos(self._task, [self._examples[place] for place in nearest])(**inputs)


def _kate(job: Job) -> Outcome:
    """Nearest neighbours of the whole trainset."""
    count = demos_per_prompt(job.task)
    return _outcome(Nearest(job.task, job.examples.train, count), demos=count)


def _adaicl(job: Job) -> Outcome:
    """AdaICL (arXiv:2310.20046): annotates hard examples that cover the others, then takes the nearest of those.

    The LM answers examples without demos; the least sure half is hard. Greedy weighted coverage of the hard
    examples over a graph of nearest neighbours picks the annotated ones; each input gets the nearest of them.
    """
    count = demos_per_prompt(job.task)
    kept = random.Random(job.seed).sample(job.examples.train, min(len(job.examples.train), job.rollouts))
    sure = _certainties(job.task, kept)
    hard = np.argsort(sure, kind="stable")[: max(1, len(kept) // 2)]
    vectors = embeddings.embed([embeddings.text_of(one, job.task.inputs) for one in kept])
    chosen = cover(vectors, hard.tolist(), 5 * count)
    return _outcome(
        Nearest(job.task, [kept[place] for place in chosen], count), demos=count, annotated=len(chosen)
    )


def _certainties(task: Task, examples: Sequence[dspy.Example]) -> np.ndarray:
    """The LM's probability of its own answer without demos, 0 where it gives none."""
    program = task.build()

    class Certain(dspy.Module):
        def forward(self, **inputs: Any) -> dspy.Prediction:
            with distributions.collect() as found:
                program(**inputs)
            known = [max(one.probabilities.values()) for one in found if one.probabilities]
            return dspy.Prediction(certainty=known[-1] if known else 0.0)

    parallel = dspy.Parallel(num_threads=16, disable_progress_bar=True, max_errors=1_000_000)
    answers = parallel([(Certain(), one.inputs()) for one in examples])
    return np.array([getattr(answer, "certainty", 0.0) for answer in answers])


def cover(vectors: np.ndarray, hard: Sequence[int], count: int, neighbours: int = 5) -> list[int]:
    """Greedy weighted coverage: each pick covers its nearest neighbours; what is covered again counts a tenth.

    Args:
        vectors: Unit vectors of all examples, ``[N, D]``.
        hard: Examples to cover, and to pick from.
    """
    weight = dict.fromkeys(hard, 1.0)
    near = np.argsort(-(vectors @ vectors.T), axis=1, kind="stable")[:, : neighbours + 1]
    picked: list[int] = []
    while len(picked) < min(count, len(hard)):
        gains = [
            (-sum(weight.get(int(one), 0.0) for one in near[place]), place)
            for place in hard
            if place not in picked
        ]
        best = min(gains)[1]
        picked.append(best)
        for one in near[best]:
            if int(one) in weight:
                weight[int(one)] *= 0.1
    return picked


class Classifier(dspy.Module):
    """Logistic regression on embeddings: no LM at all."""

    def __init__(self, task: Task, examples: Sequence[dspy.Example], valid: Sequence[dspy.Example]) -> None:
        super().__init__()
        self._task = task
        vectors, labels = self._encode(examples)
        held, right = self._encode(valid)
        fits = [
            (fit_logistic(vectors, labels, len(task.labels), decay), decay) for decay in (1e-4, 1e-3, 1e-2)
        ]
        self._weights = max(
            fits, key=lambda fit: float(np.mean(np.argmax(_augmented(held) @ fit[0], axis=1) == right))
        )[0]

    def _encode(self, examples: Sequence[dspy.Example]) -> tuple[np.ndarray, np.ndarray]:
        texts = [embeddings.text_of(one, self._task.inputs) for one in examples]
        return embeddings.embed(texts), np.array([self._task.labels.index(one.label) for one in examples])

    def named_predictors(self) -> list[Any]:
        return []

    def forward(self, **inputs: Any) -> dspy.Prediction:
        vector = embeddings.embed([" ".join(str(inputs[name]) for name in self._task.inputs)])
        return dspy.Prediction(label=self._task.labels[int(np.argmax(_augmented(vector) @ self._weights))])


def _augmented(vectors: np.ndarray) -> np.ndarray:
    return np.concatenate([vectors, np.ones((len(vectors), 1))], axis=1)


def fit_logistic(vectors: np.ndarray, labels: np.ndarray, classes: int, decay: float) -> np.ndarray:
    """Multinomial logistic regression by gradient descent with momentum; weights ``[D + 1, classes]``."""
    inputs, targets = _augmented(vectors), np.eye(classes)[labels]
    weights = np.zeros((inputs.shape[1], classes))
    velocity = np.zeros_like(weights)
    for _ in range(500):
        scores = inputs @ weights
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        slope = inputs.T @ (shares - targets) / len(inputs) + decay * weights
        velocity = 0.9 * velocity - 2.0 * slope
        weights = weights + velocity
    return weights


def _embedding_classifier(job: Job) -> Outcome:
    return _outcome(Classifier(job.task, job.examples.train, job.examples.valid))


BASELINES: dict[str, Callable[[Job], Outcome]] = {
    "manual_prompt": _manual_prompt,
    "zero_shot_cot": _zero_shot_cot,
    "random_icl": _random_icl,
    "kate": _kate,
    "adaicl": _adaicl,
    "embedding_classifier": _embedding_classifier,
}
TRAITS: dict[str, dict[str, bool]] = {
    "manual_prompt": {"searches": False, "seeded": False},
    "zero_shot_cot": {"searches": False, "seeded": False},
    "random_icl": {"searches": False},
    "kate": {"searches": False, "seeded": False, "ranked": False},
    "adaicl": {"ranked": False},
    "embedding_classifier": {"searches": False, "seeded": False, "ranked": False},
}
