"""Continuous batching: one thread that packs what all running requests need next into one pass after another.

Requests join whenever they come. Each pass holds, first, the next tokens of every answer that is being generated;
then, within the token bound, prefixes and last turns of new prompts, taken from the callers in turn. A request whose
answer is one of finitely many labels needs a single pass and no memory of its own.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import OrderedDict, deque
from functools import partial
from typing import Any

import numpy as np
import torch
from dspy.lm15 import LM15Error, NotConfiguredError, ServerError

from asyndbt_dspy.lms.local.admission import DEFAULT_RUNNING_TOKENS, Queue, has_memory, next_job
from asyndbt_dspy.lms.local.attention import PackedAttention
from asyndbt_dspy.lms.local.jobs import LONGEST_TAIL, Decoder, Job, PromptBudget, finish, guarded
from asyndbt_dspy.lms.local.lanes import Lanes, split_pass
from asyndbt_dspy.lms.local.layout import PassItem, build_layout
from asyndbt_dspy.lms.local.prefix_cache import Node, PrefixCache
from asyndbt_dspy.lms.local.slots import SlotStore


class Scheduler:
    """Owns the model's thread, the prefix cache and the slots.

    Args:
        decoder: The model.
        max_batch_tokens: Bound on the tokens of a pass, >= 16; generated tokens may exceed it.
        prefix_cache_tokens: Bound on the prefix cache; 0 computes every prompt on its own.
        max_running_tokens: Bound on the rows of running requests, and on their prompts; further ones wait. One always
            runs.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_batch_tokens: int,
        prefix_cache_tokens: int,
        max_running_tokens: int = DEFAULT_RUNNING_TOKENS,
    ) -> None:
        self._decoder = decoder
        self._max_running_tokens = max_running_tokens
        self._max_batch_tokens = max_batch_tokens
        self._sharing = prefix_cache_tokens > 0
        self.cache = PrefixCache(prefix_cache_tokens, _split_kv)
        shape = decoder.shape
        self._slots = SlotStore(
            shape.layers,
            shape.key_heads,
            shape.head_size,
            decoder.dtype,
            decoder.device,
            max_tokens=max_running_tokens,
        )
        self._longest_row = 0
        self._row_owner: list[Job] = []
        self._lanes = Lanes(decoder.device)
        self._condition = threading.Condition()
        self._arrived: list[Job] = []
        self._waiting: OrderedDict[Queue, deque[Job]] = OrderedDict()
        self._running: list[Job] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self.passes = 0
        self.pass_tokens = 0

    def submit(self, job: Job) -> None:
        """Hand in a job; starts the thread when there is none (at first, and after it died).

        Raises:
            NotConfiguredError: The scheduler is closed; to ask again would not help.
        """
        with self._condition:
            if self._closed:
                raise NotConfiguredError("the local engine is closed; make a new one with local_lm(...)")
            if not job.answer.done:
                self._enqueue(job)
                return
        # The schema left nothing to choose: there is nothing to ask the model.
        finish(job, None)

    def _enqueue(self, job: Job) -> None:
        self._arrived.append(job)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._serve, name="asyndbt-local-lm", daemon=True)
            self._thread.start()
            # A daemon thread inside torch when the interpreter ends aborts the process.
            atexit.register(_close_at_exit, weakref.ref(self), self._thread)
        self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Give up a job; it leaves before the next pass."""
        job.cancelled = True
        with self._condition:
            self._condition.notify()

    @property
    def closed(self) -> bool:
        """Whether `stop` was called."""
        return self._closed

    def stop(self) -> None:
        """Let the thread end after the pass at hand; jobs that are not done get an error."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def close(self) -> None:
        """`stop`, and wait until the thread has ended."""
        self.stop()
        with self._condition:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._lanes.close()

    def _serve(self) -> None:
        try:
            with torch.inference_mode():
                while self._collect():
                    self._step()
            self._abandon(NotConfiguredError("the local engine was closed before the request was done"))
        except BaseException as error:
            # The thread is about to die: nobody may be left waiting. The next submit starts a fresh one.
            wrapped = (
                error if isinstance(error, LM15Error) else ServerError(f"the local engine failed: {error!r}")
            )
            if wrapped is not error:
                wrapped.__cause__ = error
            self._abandon(wrapped)
            if not isinstance(error, Exception):
                raise

    def _abandon(self, error: BaseException) -> None:
        with self._condition:
            jobs = self._arrived + [job for queue in self._waiting.values() for job in queue] + self._running
            self._arrived, self._running = [], []
            self._waiting.clear()
            # Before a new request can start the next thread: the state would be taken from under its feet.
            self.cache.clear()
            self._row_owner.clear()
            self._slots.clear()
            if threading.current_thread() is self._thread:
                self._thread = None
        for job in jobs:
            finish(job, error)

    def _collect(self) -> bool:
        """Wait until there is something to do and sort new jobs into their callers' queues; False when closed."""
        with self._condition:
            while not (self._closed or self._arrived or self._waiting or self._running):
                self._condition.wait()
            if self._closed:
                return False
            arrived, self._arrived = self._arrived, []
        for job in arrived:
            # What needs no memory does not stand behind what waits for it.
            self._waiting.setdefault((job.caller, job.row_tokens > 0), deque()).append(job)
        return True

    def _step(self) -> None:
        self._drop_cancelled()
        self._longest_row = max((job.row_tokens for job in self._running), default=0)
        items: list[tuple[PassItem, Job | None]] = []
        for job in self._running:
            if job.prefilled:
                items.append((self._next_tokens(job), job))
        budget = self._max_batch_tokens - sum(len(item.tokens) for item, _ in items)
        self._admit(items, budget)
        if items:
            self._run(items)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._running if job.cancelled]:
            self._leave(job)
            finish(job, None)
        for caller in list(self._waiting):
            queue = self._waiting[caller]
            if any(job.cancelled for job in queue):
                for job in queue:
                    if job.cancelled:
                        finish(job, None)
                queue = deque(job for job in queue if not job.cancelled)
                self._waiting[caller] = queue
            if not queue:
                del self._waiting[caller]

    def _admit(self, items: list[tuple[PassItem, Job | None]], budget: int) -> None:
        """Add prompts to the pass: those begun in earlier passes first, then one of each caller in turn, memory allowing.

        All of them enter the tree before any is planned: a later one may split the node of an earlier one.
        """
        pending = [job for job in self._running if not job.prefilled]
        expected = sum(len(job.prompt) - job.tail_start for job in pending)
        while self._waiting and expected < budget:
            job = next_job(self._waiting, self._fits)
            if job is None:
                break
            # Before anything that can fail: a job that is in no list would never be settled.
            self._running.append(job)
            pending.append(job)
            self._longest_row = max(self._longest_row, job.row_tokens)
            expected += self._begin(job)
        planned = PromptBudget(budget)
        for job in pending:
            if not self._plan_prompt(job, items, planned):
                break

    def _fits(self, job: Job) -> bool:
        own = 0 if self._sharing else sum(each.tail_start for each in self._running)
        prompts = self.cache.pinned_tokens + own
        return has_memory(job, self._running, prompts, self._max_running_tokens)

    def _begin(self, job: Job) -> int:
        """Find what is known of the prompt, put what is likely shared into the tree; returns tokens to compute."""
        job.ask = job.answer.ask()
        prompt = job.prompt
        boundary = max(job.last_turn, len(prompt) - LONGEST_TAIL)
        # Without sharing, a tree of its own: long prompts still run in pieces.
        node = self.cache.match(prompt[:-1]) if self._sharing else Node((), 0, None)
        job.cached_tokens = _computed_tokens(node)
        if node.end < boundary:
            ids = prompt[node.end : boundary]
            node = self.cache.extend(node, ids) if self._sharing else Node(tuple(ids), 0, node)
        job.node, job.tail_start = node, node.end
        if self._sharing:
            self.cache.pin(node)
        return len(prompt) - job.cached_tokens

    def _plan_prompt(self, job: Job, items: list[tuple[PassItem, Job | None]], budget: PromptBudget) -> bool:
        """Add the pending nodes of a prompt, then its last turn; False when the budget does not reach so far."""
        assert job.node is not None
        assert job.ask is not None
        for node in job.node.path():
            if node.kv is not None:
                continue
            if budget.left <= 0:
                return False
            if len(node.tokens) > budget.left:
                node = self.cache.split(node, budget.left)
            node.kv = self._allocate(len(node.tokens))
            items.append((self._node_item(node), None))
            budget.spend(len(node.tokens))
        if any(node.kv is None for node in job.node.path()):
            return False
        tail = job.prompt[job.tail_start :]
        size = len(tail) + len(job.ask.append) + (job.ask.trie.rows - 1 if job.ask.trie else 0)
        if not budget.fits(size):
            return False
        if not job.answer.answer.single_pass:
            self._reserve(len(self._row_owner) + 1, size)
            job.row, job.row_length = self._slots.take(), 0
            self._row_owner.append(job)
        job.prefilled = True
        items.append((self._job_item(job, [*tail, *job.ask.append]), job))
        budget.spend(size)
        return True

    def _next_tokens(self, job: Job) -> PassItem:
        job.ask = job.answer.ask()
        tokens = list(job.ask.append)
        size = job.row_length + len(tokens) + (job.ask.trie.rows - 1 if job.ask.trie else 0)
        self._reserve(len(self._row_owner), size)
        return self._job_item(job, tokens)

    def _reserve(self, rows: int, tokens: int) -> None:
        # Also where an answer came to more than was expected: the store must not shrink below it for the next one.
        self._longest_row = max(self._longest_row, tokens)
        self._slots.reserve(rows, tokens, self._longest_row)

    def _job_item(self, job: Job, tokens: list[int]) -> PassItem:
        assert job.node is not None
        assert job.ask is not None
        trie = job.ask.trie
        tree = trie.tree if trie is not None else None
        last = len(tokens) - 1
        wanted = (last, *range(last + 1, last + trie.rows)) if trie is not None else (last,)
        return PassItem(
            tokens=tokens + list(tree.tokens) if tree is not None else tokens,
            start=job.tail_start + job.row_length,
            path=tuple(job.node.path()),
            row=job.row,
            row_length=job.row_length,
            tree=tree,
            wanted=wanted,
        )

    def _node_item(self, node: Node) -> PassItem:
        return PassItem(list(node.tokens), node.start, tuple(node.path()[:-1]), node=node)

    def _allocate(self, tokens: int) -> torch.Tensor:
        shape = self._decoder.shape
        return torch.empty(
            (shape.layers, 2, tokens, shape.key_heads, shape.head_size),
            dtype=self._decoder.dtype,
            device=self._decoder.device,
        )

    def _run(self, planned: list[tuple[PassItem, Job | None]]) -> None:
        owners = {id(item): job for item, job in planned}
        self.passes += 1
        for phase in split_pass([item for item, _ in planned], self._lanes.count):
            self.pass_tokens += sum(len(item.tokens) for part in phase for item in part)
            for items, *scores in self._lanes.run([partial(self._run_part, part) for part in phase]):
                asking = [(item, job) for item in items if (job := owners[id(item)]) is not None]
                for item, job in asking:
                    if job.row is not None:
                        job.row_length += item.linear
                        self._slots.lengths[job.row] = job.row_length
                self._hand_out(asking, *scores)
        for job in [job for job in self._running if job.answer.done or job.error is not None]:
            self._leave(job)
            finish(job, job.error)

    def _run_part(self, part: list[PassItem]) -> tuple[list[PassItem], torch.Tensor, torch.Tensor]:
        """The items in packed order, their logits and log-sum-exps; runs in a lane."""
        layout = build_layout(
            part,
            heads_per_key=self._decoder.shape.heads_per_key,
            windows=self._decoder.windows,
            slot_capacity=self._slots.capacity,
            dtype=self._decoder.dtype,
            device=self._decoder.device,
        )
        attention = PackedAttention(layout, self._decoder.shape, self._slots)
        return layout.items, *self._decoder.run(layout, attention)

    def _hand_out(
        self, asking: list[tuple[PassItem, Job]], logits: torch.Tensor, normalizers: torch.Tensor
    ) -> None:
        """Give every answer its scores; an answer that fails takes its own request with it, and no other."""
        if not asking:
            return
        first = 0
        label_jobs: list[tuple[Job, int, int]] = []
        edge_rows: list[np.ndarray] = []
        edge_tokens: list[np.ndarray] = []
        token_jobs: list[tuple[Job, int]] = []
        edges = 0
        for item, job in asking:
            assert job.ask is not None
            trie = job.ask.trie
            if trie is not None:
                edge_rows.append(trie.scored_rows + first)
                edge_tokens.append(trie.scored_tokens)
                label_jobs.append((job, edges, edges + len(trie.scored_rows)))
                edges += len(trie.scored_rows)
            else:
                token_jobs.append((job, first))
            first += len(item.wanted)
        if label_jobs:
            rows = torch.from_numpy(np.concatenate(edge_rows)).to(logits.device)
            tokens = torch.from_numpy(np.concatenate(edge_tokens)).to(logits.device)
            values = (logits[rows, tokens] - normalizers[rows]).double().cpu().numpy()
            for job, start, end in label_jobs:
                guarded(job, partial(job.answer.take_labels, values[start:end]))
        if token_jobs:
            self._hand_out_tokens(token_jobs, logits, normalizers)
        for _, job in asking:
            self._end_at_context(job)

    def _hand_out_tokens(
        self, jobs: list[tuple[Job, int]], logits: torch.Tensor, normalizers: torch.Tensor
    ) -> None:
        likeliest = logits.argmax(dim=-1).tolist() if any(job.answer.plain_greedy for job, _ in jobs) else []
        for job, row in jobs:
            if job.answer.plain_greedy:
                guarded(job, partial(job.answer.take_chosen, likeliest[row]))
            else:
                scores = (logits[row] - normalizers[row]).cpu().numpy()
                guarded(job, partial(job.answer.take_token, scores))

    def _end_at_context(self, job: Job) -> None:
        """End an answer whose next choice lies past what the model reads: there it may have no positions at all."""
        if job.answer.done or job.error is not None:
            return
        if job.tail_start + job.row_length + job.answer.next_tokens > self._decoder.context_tokens:
            job.answer.done, job.answer.finish_reason = True, "length"

    def _leave(self, job: Job) -> None:
        """Give back what a job holds."""
        self._running.remove(job)
        if job.row is not None:
            moved = self._slots.give_back(job.row)
            owner = self._row_owner.pop()
            if moved is not None:
                owner.row = job.row
                self._row_owner[job.row] = owner
            job.row = None
        if job.node is not None and self._sharing:
            self.cache.unpin(job.node)
        job.node = None


def _split_kv(kv: Any, length: int) -> tuple[Any, Any]:
    # Copies, not views: a view would keep the memory of the whole run alive after one part was evicted.
    return kv[:, :, :length].clone(), kv[:, :, length:].clone()


def _computed_tokens(node: Node) -> int:
    return sum(len(each.tokens) for each in node.path() if each.kv is not None)


def _close_at_exit(reference: weakref.ref[Scheduler], thread: threading.Thread) -> None:
    scheduler = reference()
    if scheduler is not None:
        scheduler.close()
    del scheduler
    thread.join()  # who was the last to hold the weights frees them, inside torch
