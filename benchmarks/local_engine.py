"""How fast the local LM engine is, against other ways to run the same model under DSPy.

    python benchmarks/local_engine.py            # prints one JSON object; about ten minutes on two cores
    python benchmarks/local_engine.py --quick    # fewer requests, noisier ratios

All loads use the committed prompts in `prompts/trec_six_demos.json` (trec, six demos, one of each class) and
SmolLM2-135M, in one run, through DSPy's JSONAdapter with up to 32 requests in flight. Every baseline gets the dtype
of the engine (llama.cpp: the GGUF file), the same grammar for the answer with a stop after the label, and the better
of one thread and all threads. Baselines that answer one request at a time are measured on fewer requests; rates are
per second of wall time. `enum_vs_generate_prefilled` is against a `generate` that also gets the beginning of the
answer (all that the grammar forces before the label) as part of its prompt, which no general server would know.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dspy
import torch
from dspy.lm15 import Config, Message, Request, Response, Usage
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyndbt_dspy.lms.distributions import collect
from asyndbt_dspy.lms.local import local_lm
from asyndbt_dspy.lms.local.models import cpu_computes_bfloat16
from asyndbt_dspy.lms.local.weights import PACKAGED_MODELS, find_model, packaged_gguf

MODEL = "smollm2-135m"
IN_FLIGHT = 32
NEW_TOKENS = 48
PROMPTS = Path(__file__).parent / "prompts" / "trec_six_demos.json"
# The answer's layout in the prompts' demos; what every engine writes before the label.
LEAD = '{\n  "label": "'


class Classify(dspy.Signature):
    """Classify the question by the type of answer that it asks for."""

    question: str = dspy.InputField()
    label: str = dspy.OutputField()


class Prompts:
    """The committed candidates (programs with six demos each) and questions."""

    def __init__(self) -> None:
        content = json.loads(PROMPTS.read_text(encoding="utf-8"))
        self.labels: list[str] = content["labels"]
        self.questions: list[str] = [example["question"] for example in content["examples"]]
        labelled = Classify.with_updated_fields("label", type_=Literal[tuple(self.labels)])  # type: ignore[valid-type]
        self.programs: list[dspy.Predict] = []
        for demos in content["candidates"]:
            program = dspy.Predict(labelled)
            program.demos = [dspy.Example(**demo) for demo in demos]
            self.programs.append(program)

    def load(self, programs: int, questions: int) -> list[tuple[dspy.Predict, str]]:
        """Candidate by candidate, as an optimizer evaluates them."""
        return [
            (program, question)
            for program in self.programs[:programs]
            for question in self.questions[:questions]
        ]


def rate(
    lm: dspy.LM, load: Sequence[tuple[dspy.Predict, str]], call: Callable[[dspy.LM, Any, str], Any]
) -> float:
    """Requests per second of wall time, IN_FLIGHT at a time, after one request to warm up."""
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter(), disable_history=True):
        call(lm, *load[0])
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            started = time.perf_counter()
            futures = [pool.submit(copy_context().run, call, lm, *work) for work in load]
            for future in futures:
                future.result()
            return len(load) / (time.perf_counter() - started)


def classify(lm: dspy.LM, program: dspy.Predict, question: str) -> Any:
    """One enumerated rollout."""
    return program(question=question).label


def write(lm: dspy.LM, program: dspy.Predict, question: str) -> Any:
    """One rollout of free text: the same prompt, answered without a schema, NEW_TOKENS long."""
    messages = dspy.ChatAdapter().format(program.signature, program.demos, {"question": question})
    turns = [
        Message.user(each["content"]) if each["role"] == "user" else Message.assistant(each["content"])
        for each in messages[1:]
    ]
    config = Config(max_tokens=NEW_TOKENS, temperature=0.0)
    return lm(Request(model=lm.model, system=messages[0]["content"], messages=tuple(turns), config=config))


class BaselineEngine:
    """A dspy engine over a function from prompt token ids and a schema flag to the answer's text."""

    supports_response_schema = True
    supported_params = frozenset({"response_format", "temperature", "max_tokens"})

    def __init__(
        self, tokenizer: Any, answer: Callable[[list[int], bool], str], *, prefilled: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._answer = answer
        self._prefilled = prefilled
        self._lock = threading.Lock()

    def complete(self, request: Request) -> Response:
        """One request at a time, as these libraries serve them."""
        messages = [{"role": "system", "content": request.system}] if request.system else []
        messages += [{"role": message.role, "content": message.text} for message in request.messages]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        constrained = request.config.response_format is not None
        lead = LEAD if constrained and self._prefilled else ""
        ids = self._tokenizer(text + lead, add_special_tokens=False).input_ids
        with self._lock:
            answer = lead + self._answer(ids, constrained) + ('"\n}' if constrained else "")
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant(answer),
            finish_reason="stop",
            usage=Usage(input_tokens=len(ids), output_tokens=0),
        )

    def lm(self) -> dspy.LM:
        """The engine as a dspy.LM."""
        return dspy.LM("baseline/model", engine=self, cache=False)


class GenerateBaseline:
    """transformers' `generate`, once per request."""

    def __init__(self, labels: Sequence[str], dtype: torch.dtype) -> None:
        folder = find_model(MODEL).pretrained
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        runs = [LEAD + label for label in labels]
        self._runs = [self.tokenizer(run, add_special_tokens=False).input_ids for run in runs]
        self._lead = len(self.tokenizer(LEAD, add_special_tokens=False).input_ids)

    def skip_lead(self) -> None:
        """From now on prompts end with the beginning of the answer, and only the label is generated."""
        self._runs = [run[self._lead :] for run in self._runs]

    def answer(self, ids: list[int], constrained: bool) -> str:
        """Greedy answer; a label needs no token after its last one."""
        inputs = torch.tensor([ids])
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        if constrained:
            options |= {
                "max_new_tokens": max(map(len, self._runs)),
                "prefix_allowed_tokens_fn": self._allowed(len(ids)),
            }
        else:
            options |= {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        with torch.inference_mode():
            output = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        text = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        return text

    def _allowed(self, length: int) -> Callable[[int, torch.Tensor], list[int]]:
        end = self.tokenizer.eos_token_id

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            begun = ids[length:].tolist()
            following = {
                run[len(begun)] for run in self._runs if len(run) > len(begun) and run[: len(begun)] == begun
            }
            return list(following) or [end]

        return allowed


def best_threads(measure: Callable[[], float]) -> tuple[float, int]:
    """The better rate of one thread and all threads."""
    every = torch.get_num_threads()
    best = (0.0, every)
    try:
        for count in sorted({1, every}):
            torch.set_num_threads(count)
            best = max(best, (measure(), count))
    finally:
        torch.set_num_threads(every)
    return best


def measure_generate(prompts: Prompts, dtype: torch.dtype, requests: int) -> dict[str, Any]:
    """Rates of `generate` per request, for labels and for text."""
    baseline = GenerateBaseline(prompts.labels, dtype)
    lm = BaselineEngine(baseline.tokenizer, baseline.answer).lm()
    labels, label_threads = best_threads(lambda: rate(lm, prompts.load(1, requests), classify))
    texts, text_threads = best_threads(lambda: rate(lm, prompts.load(1, max(4, requests // 4)), write))
    baseline.skip_lead()
    lm = BaselineEngine(baseline.tokenizer, baseline.answer, prefilled=True).lm()
    prefilled, _ = best_threads(lambda: rate(lm, prompts.load(1, requests), classify))
    return {
        "enum": labels,
        "enum_threads": label_threads,
        "enum_prefilled": prefilled,
        "text": texts,
        "text_threads": text_threads,
    }


def measure_continuous_batching(prompts: Prompts, dtype: torch.dtype, requests: int) -> dict[str, Any]:
    """transformers' own continuous batching on the text load, all prompts handed over at once (no DSPy in between)."""
    baseline = GenerateBaseline(prompts.labels, dtype)
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=baseline.tokenizer.pad_token_id,
    )
    inputs: list[list[int]] = []
    for program, question in prompts.load(2, requests // 2):
        messages = dspy.ChatAdapter().format(program.signature, program.demos, {"question": question})
        text = baseline.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs.append(baseline.tokenizer(text, add_special_tokens=False).input_ids)
    try:
        baseline.model.generate_batch(inputs[:1], generation_config=config, progress_bar=False)
        started = time.perf_counter()
        outputs = baseline.model.generate_batch(inputs, generation_config=config, progress_bar=False)
        seconds = time.perf_counter() - started
    except Exception as error:  # noqa: BLE001 - whatever keeps it from running on a CPU is the finding
        return {"text": None, "why": f"{type(error).__name__}: {error}"[:300]}
    written = sum(len(output.generated_tokens) for output in outputs.values())
    if written < 0.9 * len(inputs) * NEW_TOKENS:
        return {"text": None, "why": f"wrote {written} of {len(inputs) * NEW_TOKENS} tokens"}
    return {"text": len(inputs) / seconds}


def measure_llama_cpp(prompts: Prompts, requests: int) -> dict[str, Any]:
    """llama-cpp-python on the GGUF file, with the prefix of the previous request kept."""
    if importlib.util.find_spec("llama_cpp") is None:
        return {"enum": None, "why": "llama-cpp-python is not installed"}
    import llama_cpp

    gguf = packaged_gguf(PACKAGED_MODELS[MODEL])
    tokenizer = AutoTokenizer.from_pretrained(find_model(MODEL).pretrained)
    choices = " | ".join(json.dumps(label) for label in prompts.labels)
    grammar = llama_cpp.LlamaGrammar.from_string(f"root ::= {json.dumps(LEAD)} ({choices})", verbose=False)
    longest = max(
        len(tokenizer(LEAD + label, add_special_tokens=False).input_ids) for label in prompts.labels
    )
    best: dict[str, Any] = {"enum": 0.0}
    for threads in sorted({1, torch.get_num_threads()}):
        model = llama_cpp.Llama(
            str(gguf), n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=1024, verbose=False
        )

        def answer(ids: list[int], constrained: bool, model: Any = model) -> str:
            output = model.create_completion(ids, max_tokens=longest, temperature=0.0, grammar=grammar)
            text: str = output["choices"][0]["text"]
            return text

        lm = BaselineEngine(tokenizer, answer).lm()
        found = rate(lm, prompts.load(2, requests // 2), classify)
        if found > best["enum"]:
            best = {"enum": found, "enum_threads": threads}
        model.close()
    return best


def measure_llama_cpp_apart(requests: int) -> dict[str, Any]:
    """`measure_llama_cpp` in a process of its own: its library does not share its threads with PyTorch's."""
    command = [sys.executable, __file__, "--llamacpp", str(requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"enum": None, "why": f"exit code {done.returncode}: {done.stderr[-300:]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_engine(prompts: Prompts, programs: int, questions: int) -> dict[str, Any]:
    """Rates of the local engine: labels, labels without the prefix cache, text."""
    lm = local_lm(MODEL)
    found: dict[str, Any] = {"enum": rate(lm, prompts.load(programs, questions), classify)}
    found["text"] = rate(lm, prompts.load(2, max(IN_FLIGHT, questions // 2)), write)
    lm.engine.close()
    plain = local_lm(MODEL, prefix_cache_tokens=0)
    found["enum_without_cache"] = rate(plain, prompts.load(2, questions // 2), classify)
    plain.engine.close()
    return found


def largest_difference(prompts: Prompts) -> dict[str, float]:
    """Answers in a batch with the cache against one request at a time without it, in float32."""
    load = prompts.load(2, 16)

    def answer(lm: dspy.LM, program: dspy.Predict, question: str) -> tuple[str, dict[str, float]]:
        with collect() as records:
            label = program(question=question).label
        return label, records[0].probabilities

    results: list[list[tuple[str, dict[str, float]]]] = []
    for cache_tokens, in_flight in ((16384, IN_FLIGHT), (0, 1)):
        lm = local_lm(MODEL, dtype="float32", prefix_cache_tokens=cache_tokens)
        with (
            dspy.context(lm=lm, adapter=dspy.JSONAdapter(), disable_history=True),
            ThreadPoolExecutor(in_flight) as pool,
        ):
            futures = [pool.submit(copy_context().run, answer, lm, *work) for work in load]
            results.append([future.result() for future in futures])
        lm.engine.close()
    pairs = list(zip(*results, strict=True))
    return {
        "different_answers": sum(one[0] != other[0] for one, other in pairs),
        "probability": max(abs(one[1][label] - other[1][label]) for one, other in pairs for label in one[1]),
    }


def measure_overhead(prompts: Prompts, requests: int) -> dict[str, float]:
    """CPU milliseconds per request of the engine with a model that computes nothing, and of DSPy around it."""
    from local_engine_overhead import model_free_lm, null_lm

    def cpu_ms(lm: dspy.LM) -> float:
        load = prompts.load(2, requests // 2)
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter(), disable_history=True):
            for work in load[:8]:
                classify(lm, *work)
            with ThreadPoolExecutor(IN_FLIGHT) as pool:
                started = time.process_time()
                for future in [pool.submit(copy_context().run, classify, lm, *work) for work in load]:
                    future.result()
                return (time.process_time() - started) / len(load) * 1e3

    dspy_ms = cpu_ms(null_lm(prompts.labels[0]))
    lm = model_free_lm(MODEL)
    total_ms = cpu_ms(lm)
    lm.engine.close()
    return {"engine_ms": total_ms - dspy_ms, "dspy_ms": dspy_ms}


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """How many times faster, or None where one could not be measured."""
    return None if not ours or not theirs else round(ours / theirs, 2)


def main() -> int:
    """Measure everything and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--llamacpp", type=int, metavar="REQUESTS", help="measure llama-cpp-python only")
    arguments = parser.parse_args()
    quick = arguments.quick
    logging.disable(logging.WARNING)
    prompts = Prompts()
    if arguments.llamacpp:
        sys.stdout.write(json.dumps(measure_llama_cpp(prompts, arguments.llamacpp)) + "\n")
        return 0
    dtype = torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    overhead = measure_overhead(prompts, 64 if quick else 256)
    engine = measure_engine(prompts, *((4, 32) if quick else (8, 64)))
    gc.collect()
    generate = measure_generate(prompts, dtype, 8 if quick else 24)
    llama = measure_llama_cpp_apart(16 if quick else 48)
    batching = measure_continuous_batching(prompts, dtype, 16 if quick else 32)
    result = {
        "model": MODEL,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "in_flight": IN_FLIGHT,
        "enum_vs_generate": ratio(engine["enum"], generate["enum"]),
        "enum_vs_generate_prefilled": ratio(engine["enum"], generate["enum_prefilled"]),
        "enum_vs_llamacpp": ratio(engine["enum"], llama["enum"]),
        "text_vs_generate": ratio(engine["text"], generate["text"]),
        "text_vs_transformers_cb": ratio(engine["text"], batching["text"]),
        "prefix_gain": ratio(engine["enum"], engine["enum_without_cache"]),
        "overhead": {name: round(value, 3) for name, value in overhead.items()},
        "equality": largest_difference(prompts),
        "rates_per_second": {
            "engine": engine,
            "generate": generate,
            "llamacpp": llama,
            "transformers_cb": batching,
        },
    }
    json.dump(result, sys.stdout)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
