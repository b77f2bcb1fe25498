"""Programs, labels and data of each task. Every optimizer gets the same examples in the same order of files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dspy


class Sst2(dspy.Signature):
    """Classify the sentiment of the sentence from a film review as positive or negative."""

    sentence: str = dspy.InputField()
    label: Literal["positive", "negative"] = dspy.OutputField()


class Trec(dspy.Signature):
    """Classify the type of answer that the question asks for.

    abbreviation: an abbreviation or what it stands for. description: a definition, a reason or a manner.
    entity: a thing, an animal, a product or a work. human: a person or a group. location: a place.
    number: a count, a date or another number.
    """

    question: str = dspy.InputField()
    label: Literal["abbreviation", "description", "entity", "human", "location", "number"] = (
        dspy.OutputField()
    )


class Cola(dspy.Signature):
    """Is the sentence grammatically acceptable English?"""

    sentence: str = dspy.InputField()
    label: Literal["yes", "no"] = dspy.OutputField()


class Qnli(dspy.Signature):
    """Does the sentence contain the answer to the question?"""

    question: str = dspy.InputField()
    sentence: str = dspy.InputField()
    label: Literal["yes", "no"] = dspy.OutputField()


class Mrpc(dspy.Signature):
    """Do the two sentences mean the same?"""

    sentence1: str = dspy.InputField()
    sentence2: str = dspy.InputField()
    label: Literal["yes", "no"] = dspy.OutputField()


class Qqp(dspy.Signature):
    """Do the two questions ask for the same?"""

    question1: str = dspy.InputField()
    question2: str = dspy.InputField()
    label: Literal["yes", "no"] = dspy.OutputField()


class AgNews(dspy.Signature):
    """Classify the topic of the news item."""

    title: str = dspy.InputField()
    description: str = dspy.InputField()
    label: Literal["World", "Sports", "Business", "Sci/Tech"] = dspy.OutputField()


Intent = Literal[
    "card arrival",
    "card payment fee charged",
    "cash withdrawal charge",
    "exchange rate",
    "lost or stolen card",
    "pending transfer",
    "request refund",
    "top up failed",
    "transfer timing",
    "verify my identity",
]


class Banking77(dspy.Signature):
    """Classify the intent of the customer's message to a bank."""

    text: str = dspy.InputField()
    label: Intent = dspy.OutputField()


class NewsKeywords(dspy.Signature):
    """Extract the words of the news item that tell its topic."""

    title: str = dspy.InputField()
    description: str = dspy.InputField()
    keywords: str = dspy.OutputField(desc="a few words")


class KeywordsTopic(dspy.Signature):
    """Classify the topic of the news item with these keywords."""

    title: str = dspy.InputField()
    keywords: str = dspy.InputField()
    label: Literal["World", "Sports", "Business", "Sci/Tech"] = dspy.OutputField()


class Restate(dspy.Signature):
    """Restate in a few words what the customer wants from the bank."""

    text: str = dspy.InputField()
    wish: str = dspy.OutputField(desc="a few words")


class WishIntent(dspy.Signature):
    """Classify the intent of the customer's message to a bank."""

    text: str = dspy.InputField()
    wish: str = dspy.InputField(desc="what the customer wants")
    label: Intent = dspy.OutputField()


class QuestionFocus(dspy.Signature):
    """Name in a few words the thing that the question asks for."""

    question: str = dspy.InputField()
    focus: str = dspy.OutputField(desc="a few words")


class FocusType(dspy.Signature):
    """Classify the type of answer that the question asks for."""

    question: str = dspy.InputField()
    focus: str = dspy.InputField(desc="the thing that the question asks for")
    label: Literal["abbreviation", "description", "entity", "human", "location", "number"] = (
        dspy.OutputField()
    )


class ReviewWords(dspy.Signature):
    """Quote the words of the sentence from a film review that say how the reviewer liked the film."""

    sentence: str = dspy.InputField()
    words: str = dspy.OutputField(desc="a few words")


class WordsSentiment(dspy.Signature):
    """Classify the sentiment of the sentence from a film review as positive or negative."""

    sentence: str = dspy.InputField()
    words: str = dspy.InputField(desc="the words that say how the reviewer liked the film")
    label: Literal["positive", "negative"] = dspy.OutputField()


# Programs are written out one by one, as users write theirs: MIPROv2 shows the source of a program to its proposer.
class QuoteThenClassify(dspy.Module):
    """Two predictors: the words that tell, then the sentiment. Not in the grid: constants may be chosen on it."""

    def __init__(self) -> None:
        super().__init__()
        self.quote = dspy.Predict(ReviewWords)
        self.classify = dspy.Predict(WordsSentiment)

    def forward(self, sentence: str) -> dspy.Prediction:
        found = self.quote(sentence=sentence)
        return self.classify(sentence=sentence, words=found.words)

    async def aforward(self, sentence: str) -> dspy.Prediction:
        found = await self.quote.acall(sentence=sentence)
        return await self.classify.acall(sentence=sentence, words=found.words)


class FocusThenClassify(dspy.Module):
    """Two predictors: what a question asks for, then its type. Not in the grid: constants may be chosen on it."""

    def __init__(self) -> None:
        super().__init__()
        self.focus = dspy.Predict(QuestionFocus)
        self.classify = dspy.Predict(FocusType)

    def forward(self, question: str) -> dspy.Prediction:
        found = self.focus(question=question)
        return self.classify(question=question, focus=found.focus)

    async def aforward(self, question: str) -> dspy.Prediction:
        found = await self.focus.acall(question=question)
        return await self.classify.acall(question=question, focus=found.focus)


class ExtractThenClassify(dspy.Module):
    """Two predictors: keywords of a news item, then its topic."""

    def __init__(self) -> None:
        super().__init__()
        self.extract = dspy.Predict(NewsKeywords)
        self.classify = dspy.Predict(KeywordsTopic)

    def forward(self, title: str, description: str) -> dspy.Prediction:
        found = self.extract(title=title, description=description)
        return self.classify(title=title, keywords=found.keywords)

    async def aforward(self, title: str, description: str) -> dspy.Prediction:
        found = await self.extract.acall(title=title, description=description)
        return await self.classify.acall(title=title, keywords=found.keywords)


class RestateThenClassify(dspy.Module):
    """Two predictors: what a customer wants in a few words, then the intent."""

    def __init__(self) -> None:
        super().__init__()
        self.restate = dspy.Predict(Restate)
        self.classify = dspy.Predict(WishIntent)

    def forward(self, text: str) -> dspy.Prediction:
        found = self.restate(text=text)
        return self.classify(text=text, wish=found.wish)

    async def aforward(self, text: str) -> dspy.Prediction:
        found = await self.restate.acall(text=text)
        return await self.classify.acall(text=text, wish=found.wish)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        folder: Of the data folder.
        signature: The predictor that gives the label.
        inputs: Fields of an example that the program receives.
        build: A fresh student.
        predictors: LM calls of one rollout.
        manual: Instructions as a careful person writes them, for the baseline ``manual_prompt``.
        tuning: Whether our constants were chosen on it; the others are run after they are frozen.
        in_grid: Whether it is run and reported by default.
    """

    name: str
    folder: str
    signature: type[dspy.Signature]
    inputs: tuple[str, ...]
    build: Callable[[], dspy.Module]
    manual: str
    predictors: int = 1
    tuning: bool = False
    in_grid: bool = True

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.signature.output_fields["label"].annotation.__args__)


_MANUAL_FILMS = (
    "Decide whether the film reviewer likes or dislikes the film. Praise, enjoyment and recommendation mean "
    "positive; boredom, criticism and mockery mean negative. Judge the sentence as a whole."
)
_MANUAL_NEWS = (
    "Read the news item and choose its topic. World: politics, conflicts, diplomacy and disasters anywhere. "
    "Sports: games, teams, athletes and results. Business: companies, markets, oil and the economy. "
    "Sci/Tech: science, computers, the internet, space and gadgets."
)
_MANUAL_QUESTIONS = (
    "Say what kind of thing would answer the question: who asks for a human, where for a location, when, how "
    "many and how much for a number, what does X stand for for an abbreviation, why, how and what is for a "
    "description, and which thing, animal, product or work for an entity."
)
_MANUAL_BANK = (
    "A customer writes to a bank. Choose the intent that fits the message best: where a new card is (card arrival), "
    "a fee for paying by card, a fee for taking out cash, the exchange rate, a lost or stolen card, a transfer that is "
    "still pending, asking money back (request refund), a top up that failed, how long transfers take (transfer "
    "timing), or proving who they are (verify my identity)."
)

TASKS: dict[str, Task] = {
    one.name: one
    for one in (
        Task(
            "sst2",
            "sst2",
            Sst2,
            ("sentence",),
            lambda: dspy.Predict(Sst2),
            _MANUAL_FILMS,
            tuning=True,
        ),
        Task(
            "trec",
            "trec",
            Trec,
            ("question",),
            lambda: dspy.Predict(Trec),
            _MANUAL_QUESTIONS,
            tuning=True,
        ),
        Task(
            "ag_news",
            "ag_news",
            AgNews,
            ("title", "description"),
            lambda: dspy.Predict(AgNews),
            _MANUAL_NEWS,
            tuning=True,
        ),
        Task(
            "cola",
            "cola",
            Cola,
            ("sentence",),
            lambda: dspy.Predict(Cola),
            "Answer yes if a native speaker would accept the sentence as grammatical English, even where its meaning "
            "is odd; answer no if words are missing, misplaced or in the wrong form.",
        ),
        Task(
            "qnli",
            "qnli",
            Qnli,
            ("question", "sentence"),
            lambda: dspy.Predict(Qnli),
            "Answer yes if the sentence states what the question asks for, so that the question could be answered "
            "from this sentence alone; answer no if it is only about the same subject.",
        ),
        Task(
            "banking77",
            "banking77",
            Banking77,
            ("text",),
            lambda: dspy.Predict(Banking77),
            _MANUAL_BANK,
        ),
        Task(
            "ag_news_two_step",
            "ag_news",
            KeywordsTopic,
            ("title", "description"),
            ExtractThenClassify,
            _MANUAL_NEWS,
            predictors=2,
        ),
        Task(
            "banking77_two_step",
            "banking77",
            WishIntent,
            ("text",),
            RestateThenClassify,
            _MANUAL_BANK,
            predictors=2,
        ),
        Task(
            "trec_two_step",
            "trec",
            FocusType,
            ("question",),
            FocusThenClassify,
            _MANUAL_QUESTIONS,
            predictors=2,
            tuning=True,
            in_grid=False,
        ),
        Task(
            "sst2_two_step",
            "sst2",
            WordsSentiment,
            ("sentence",),
            QuoteThenClassify,
            _MANUAL_FILMS,
            predictors=2,
            tuning=True,
            in_grid=False,
        ),
        Task(
            "mrpc",
            "mrpc",
            Mrpc,
            ("sentence1", "sentence2"),
            lambda: dspy.Predict(Mrpc),
            "Answer yes if both sentences report the same facts in other words; answer no if one of them says something "
            "of weight that the other does not, such as another number, date, name or event.",
            in_grid=False,
        ),
        Task(
            "qqp",
            "qqp",
            Qqp,
            ("question1", "question2"),
            lambda: dspy.Predict(Qqp),
            "Answer yes if one answer would satisfy both questions; answer no if they ask about different things, or "
            "about different sides of one thing, however alike their words are.",
            in_grid=False,
        ),
    )
}
"""Of the last four, the first two are for choosing constants on programs of two predictors; the others were added after all
constants had been frozen and had their results looked at once."""


@dataclass(frozen=True)
class Examples:
    """The three parts of a task's data: ``train`` (train and pool files), ``valid`` and ``test``."""

    train: list[dspy.Example]
    valid: list[dspy.Example]
    test: list[dspy.Example]


def load(folder: Path, task: Task, *, test_limit: int | None = None) -> Examples:
    """The task's examples; nothing is copied or cached.

    Args:
        test_limit: At most so many test examples, for smoke runs.

    Raises:
        FileNotFoundError: the folder lacks the task.
    """

    def read(part: str) -> list[dspy.Example]:
        lines = (folder / task.folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        return [_example(json.loads(line), task) for line in lines]

    return Examples(read("train") + read("pool"), read("valid"), read("test")[:test_limit])


def _example(row: dict[str, Any], task: Task) -> dspy.Example:
    fields = {name: row[name] for name in task.inputs}
    return dspy.Example(**fields, label=row["label"]).with_inputs(*task.inputs)


def balanced(examples: Sequence[dspy.Example], count: int, seed: int) -> list[dspy.Example]:
    """``count`` examples drawn without replacement, as evenly over the labels as they allow, in random order."""
    generator = random.Random(seed)
    by_label: dict[str, list[dspy.Example]] = {}
    for one in generator.sample(list(examples), len(examples)):
        by_label.setdefault(one.label, []).append(one)
    drawn: list[dspy.Example] = []
    while len(drawn) < min(count, len(examples)):
        for label in generator.sample(sorted(by_label), len(by_label)):
            if by_label[label] and len(drawn) < count:
                drawn.append(by_label[label].pop())
    generator.shuffle(drawn)
    return drawn
