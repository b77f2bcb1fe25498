"""How fast the local LM engine is, against other ways to run the same model under DSPy.

    python benchmarks/local_engine.py            # prints one JSON object; about ten minutes on two cores
    python benchmarks/local_engine.py --quick    # fewer requests, noisier ratios
    python benchmarks/local_engine.py --only overhead roofline    # these two alone; both need no idle machine

All loads use the committed prompts in `prompts/trec_six_demos.json` (trec, six demos, one of each class) and
SmolLM2-135M, in one run, through DSPy's JSONAdapter with up to 32 requests in flight. Every baseline gets the dtype
of the engine (llama.cpp: the GGUF file), the same grammar for the answer with a stop after the label, and the better
of one thread and all threads. Baselines that answer one request at a time are measured on fewer requests; rates are
per second of wall time. `enum_vs_generate_prefilled` is against a `generate` that also gets the beginning of the
answer (all that the grammar forces before the label) as part of its prompt, which no general server would know.

`overhead` is CPU time, the median of five alternating runs. `roofline` sets what the engine computes for an
enumerated request against what the same cores reach in matrix products alone: of the model's own shapes, and of
2048 x 2048.

llama-cpp-python comes as source. Built for this processor with AMX, llama.cpp crashes on the first request; the
committed figure is from a build with AVX-512 (VNNI, BF16) and without AMX:
`CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON
-DGGML_AVX512_BF16=ON" pip install llama-cpp-python`. PyTorch does use AMX.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import os
import statistics
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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


def measure_overhead(prompts: Prompts, requests: int, rounds: int = 5) -> dict[str, float]:
    """CPU milliseconds per request of the engine with a model that computes nothing, and of DSPy around it."""
    from local_engine_overhead import model_free_lm, null_lm

    load = prompts.load(2, requests // 2)

    def cpu_ms(lm: dspy.LM) -> float:
        with (
            dspy.context(lm=lm, adapter=dspy.JSONAdapter(), disable_history=True),
            ThreadPoolExecutor(IN_FLIGHT) as pool,
        ):
            started = time.process_time()
            for future in [pool.submit(copy_context().run, classify, lm, *work) for work in load]:
                future.result()
            return (time.process_time() - started) / len(load) * 1e3

    alone, engine = null_lm(prompts.labels[0]), model_free_lm(MODEL)
    cpu_ms(alone), cpu_ms(engine)
    pairs = [(cpu_ms(alone), cpu_ms(engine)) for _ in range(rounds)]
    engine.engine.close()
    return {
        "engine_ms": statistics.median(total - dspy_ms for dspy_ms, total in pairs),
        "dspy_ms": statistics.median(dspy_ms for dspy_ms, _ in pairs),
    }


def measure_roofline(prompts: Prompts, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP of one enumerated request, GFLOP/s of the engine with them, and of matrix products alone."""
    lm = local_lm(MODEL)
    load = prompts.load(4, 64)
    rate(lm, load[:64], classify)
    scheduler = lm.engine.core.scheduler
    before = scheduler.pass_tokens
    per_second = rate(lm, load, classify)
    tokens = (scheduler.pass_tokens - before) / (len(load) + 1)
    lm.engine.close()
    config = AutoConfig.from_pretrained(find_model(MODEL).pretrained)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    weights = layers * (2 * width * width + 2 * width * heads + 3 * width * inner)
    gflop = 2 * tokens * weights / 1e9
    return {
        "tokens_per_request": round(tokens, 1),
        "gflop_per_request": round(gflop, 2),
        "engine_gflops": round(gflop * per_second, 1),
        "matmul_gflops_of_the_models_shapes": round(matmul_gflops(2048, width, inner, dtype), 1),
        "matmul_gflops_2048": round(matmul_gflops(2048, 2048, 2048, dtype), 1),
    }


def matmul_gflops(rows: int, inner: int, columns: int, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """GFLOP/s of one matrix product, repeated."""
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    torch.mm(left, right, out=out)
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        torch.mm(left, right, out=out)
        count += 1
    return 2 * rows * inner * columns * count / elapsed / 1e9


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """How many times faster, or None where one could not be measured."""
    return None if not ours or not theirs else round(ours / theirs, 2)


def main() -> int:
    """Measure everything and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--only", nargs="+", choices=("overhead", "roofline"), help="measure these alone")
    parser.add_argument("--llamacpp", type=int, metavar="REQUESTS", help="measure llama-cpp-python only")
    arguments = parser.parse_args()
    quick = arguments.quick
    logging.disable(logging.WARNING)
    prompts = Prompts()
    if arguments.llamacpp:
        sys.stdout.write(json.dumps(measure_llama_cpp(prompts, arguments.llamacpp)) + "\n")
        return 0
    dtype = torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "overhead": lambda: measure_overhead(prompts, 64 if quick else 128),
        "roofline": lambda: measure_roofline(prompts, dtype),
    }
    if arguments.only:
        sys.stdout.write(json.dumps({name: parts[name]() for name in arguments.only}) + "\n")
        return 0
    overhead = parts["overhead"]()
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
        "roofline": parts["roofline"](),
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
