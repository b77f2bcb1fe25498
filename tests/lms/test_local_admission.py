"""Memory of running requests: who joins, who waits, and that the bound holds while they run."""

from __future__ import annotations

from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
import torch
from local_tiny import object_format, request, scheduler_of, tiny_lm

from asyndbt_dspy.lms.local.admission import has_memory, next_job
from asyndbt_dspy.lms.local.slots import SlotStore


def job(row_tokens: int, prompt: int = 10) -> Any:
    return SimpleNamespace(row_tokens=row_tokens, prompt=[0] * prompt)


def test_rows_count_as_many_as_the_longest_and_one_always_runs() -> None:
    assert has_memory(job(640), [job(64)] * 3, prompt_tokens=100, bound=4 * 640)
    assert not has_memory(job(640), [job(64)] * 3, prompt_tokens=100, bound=4 * 640 - 1)
    assert has_memory(job(64, prompt=900), [job(64)], prompt_tokens=100, bound=1000)
    assert not has_memory(job(64, prompt=901), [job(64)], prompt_tokens=100, bound=1000)
    assert not has_memory(job(64), [job(640)], prompt_tokens=0, bound=1000)
    assert has_memory(job(640), [], prompt_tokens=0, bound=1)
    assert has_memory(job(640), [job(0)], prompt_tokens=50, bound=1)
    assert has_memory(job(0), [job(640)], prompt_tokens=5000, bound=1)


def test_nobody_overtakes_a_job_that_waits_for_memory_but_those_that_need_none() -> None:
    large, small, first, second = job(640), job(64), job(0), job(0)
    waiting = OrderedDict(a=deque([large]), b=deque([small]), c=deque([first, second]), d=deque([job(0)]))
    fits = {id(large): False, id(small): True}
    taken = [next_job(waiting, lambda each: fits[id(each)]) for _ in range(4)]
    assert taken[0] is first
    assert taken[2] is second
    assert taken[3] is None
    assert list(waiting) == ["a", "b"]
    fits[id(large)] = True
    assert next_job(waiting, lambda each: fits[id(each)]) is large
    assert next_job(waiting, lambda each: fits[id(each)]) is small
    assert not waiting


def watched(lm: dspy.LM) -> list[tuple[int, int, int]]:
    """(tokens of the slots, rows in use, tokens in the prefix cache) of every pass."""
    scheduler = scheduler_of(lm)
    run, seen = scheduler._run, []

    def look(planned: Any) -> None:
        rows, capacity = scheduler._slots._kv.shape[2:4]
        seen.append((rows * capacity, len(scheduler._slots.lengths), scheduler.cache.tokens))
        run(planned)

    scheduler._run = look
    return seen


def answers(lm: dspy.LM, count: int) -> list[str]:
    def one(index: int) -> str:
        text = f"{index} " + "word " * (5 + index % 40)
        form = object_format(why={"type": "string"}, label={"enum": ["yes", "no", "perhaps"]})
        settings: dict[str, Any] = {} if index % 2 else {"response_format": form}
        return lm(request(text, max_tokens=40 + index % 60, temperature=1.0, seed=index, **settings)).text

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("prefix_cache_tokens", [200, 0])
def test_many_at_once_stay_within_the_bound_and_are_answered_as_with_room_for_all(
    prefix_cache_tokens: int,
) -> None:
    bounded = tiny_lm(prefix_cache_tokens=prefix_cache_tokens, max_running_tokens=4000, num_retries=0)
    roomy = tiny_lm(num_retries=0)
    seen, free = watched(bounded), watched(roomy)
    assert answers(bounded, 60) == answers(roomy, 60)
    assert max(tokens for tokens, _, _ in free) > 2 * 4000, "the bound must be needed"
    assert max(tokens for tokens, _, _ in seen) <= 4000
    assert max(rows for _, rows, _ in seen) > 4
    assert max(cached for _, _, cached in seen) <= 200 + 4000
    scheduler = scheduler_of(bounded)
    assert scheduler.cache.pinned_tokens == 0
    assert not scheduler._slots.lengths
    bounded.engine.close()
    roomy.engine.close()


def test_what_is_larger_than_the_bound_runs_alone() -> None:
    lm = tiny_lm(max_running_tokens=1, num_retries=0)
    seen = watched(lm)
    assert len(answers(lm, 8)) == 8
    assert max(rows for _, rows, _ in seen) == 1
    lm.engine.close()


def test_the_slots_grow_to_their_bound_and_keep_what_is_stored() -> None:
    store = SlotStore(1, 1, 2, torch.float32, torch.device("cpu"), max_tokens=1024)
    for row in range(8):
        store.reserve(row + 1, 60, 128)
        store.lengths[store.take()] = 60
        store._kv[:, :, row, :60] = row + 1
    # 16 rows of 64 tokens would fit; 8 of 128 are what these rows can come to.
    store.reserve(8, 100, 128)
    assert store._kv.shape[2:4] == (8, 128)
    for row in range(8):
        store.give_back(7 - row) if row < 4 else None
    store.reserve(5, 500, 500)
    assert store._kv.shape[2:4] == (5, 512), "more than the bound only where it is needed"
    assert all(bool((store._kv[:, :, row, :60] == row + 1).all()) for row in range(4))
    store.reserve(9, 60, 64)
    assert store._kv.shape[2:4] == (16, 64)
    assert all(bool((store._kv[:, :, row, :60] == row + 1).all()) for row in range(4))


def test_choices_do_not_wait_behind_the_free_text_of_their_own_caller() -> None:
    lm = tiny_lm(max_running_tokens=1, num_retries=0)
    done: list[str] = []

    def ask(kind: str, **settings: Any) -> None:
        lm(request("word " * 5, seed=1, **settings))
        done.append(kind)

    choice = {"response_format": object_format(label={"enum": ["yes", "no", "perhaps"]})}
    with ThreadPoolExecutor(16) as pool:
        for kind, settings in [("text", {"max_tokens": 200})] * 8 + [("choice", choice)] * 8:
            pool.submit(ask, kind, **settings)
    assert len(done) == 16
    assert "text" not in done[:4], "texts run one at a time here, choices need no memory"
    lm.engine.close()
