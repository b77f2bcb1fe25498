"""Who joins the running requests: the callers take turns, and memory is bounded.

A request that generates text keeps a row of the slots until it is done, and pins its prompt in the prefix cache. All
rows are as long as the longest, so what counts is their number times the most tokens that any of them can come to.
Rows and prompts have the same bound, each for itself: the rows grow ahead of need, up to all of theirs.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from asyndbt_dspy.lms.local.jobs import Job

# Rows for fifty answers of up to 1,024 tokens, or two hundred of 64: 3 GB with SmolLM2 in float32.
DEFAULT_RUNNING_TOKENS = 65536


Queue = tuple[str, bool]
"""(caller, whether its jobs keep rows): each has a queue of its own."""


def has_memory(job: Job, running: Sequence[Job], prompt_tokens: int, bound: int) -> bool:
    """Whether a job may join those that run.

    Args:
        job: The job.
        running: The jobs that run.
        prompt_tokens: What the prompts of these take, each shared part once.
        bound: Tokens of all rows, and of all prompts. A job may go past it only while it has the only row.
    """
    if not job.row_tokens:
        return True
    rows = [each.row_tokens for each in running if each.row_tokens]
    if not rows:
        return True
    longest = max(job.row_tokens, *rows)
    return (len(rows) + 1) * longest <= bound and prompt_tokens + len(job.prompt) <= bound


def next_job(waiting: OrderedDict[Queue, deque[Job]], fits: Callable[[Job], bool]) -> Job | None:
    """Take the next caller's first job off the queues, or None when nobody's may join.

    Where there is no memory for a job, nobody else's overtakes it, lest it wait for ever: but for those that need no
    memory of their own.
    """
    full = False
    for caller, queue in waiting.items():
        job = queue[0]
        if job.row_tokens and (full or not fits(job)):
            full = True
            continue
        queue.popleft()
        if queue:
            waiting.move_to_end(caller)
        else:
            del waiting[caller]
        return job
    return None
