"""The one hierarchy of errors that this package raises.

AsynDBTError
├── ConfigurationError (ValueError)   a setting, a shard or a student that cannot work; raised before any LM call
├── ArtifactError (ValueError)        a saved program that cannot be written or must not be loaded; says what differs
├── ExportError (ValueError)          a prompt or chain that cannot be carried over exactly; says why
├── ProtocolError                     a message or event that the state machine refuses (wrong order, wrong shape)
├── MetricError                       a metric that returned None, NaN, something that is no number or too large a one
├── ProgramFailedError                program or metric raised again and again, and no rollout has run to its end
├── WorkerFailedError                 one worker cannot go on; it is set aside and the run goes on
├── NoLiveWorkersError                every worker was set aside; carries the best program so far
├── JournalError                      a run_dir or journal that cannot be written, read or continued; says why
├── ResumeError (JournalError)        the run_dir holds a run of something else; says everything that differs
└── BudgetExceededError               a call that would pass a hard cap; the call was not made
"""

from __future__ import annotations

from typing import Any


class AsynDBTError(Exception):
    """Base of every error of this package."""


class ConfigurationError(AsynDBTError, ValueError):
    """A setting, a shard or a student that cannot work. The message names the value, the bound and the remedy."""


class ProtocolError(AsynDBTError):
    """A message or event that a state machine refuses. The state is unchanged."""


class MetricError(AsynDBTError):
    """The metric returned something that is not a finite number, or one beyond ±1e100."""


class ProgramFailedError(AsynDBTError):
    """Program or metric raised again and again, and no rollout has run to its end. The message has the errors."""


class NoLiveWorkersError(AsynDBTError):
    """Every worker was set aside.

    Attributes:
        best_program: The best program known when the last worker was lost (the student if nothing was compared yet).
    """

    def __init__(self, message: str, best_program: Any = None) -> None:
        super().__init__(message)
        self.best_program = best_program


class BudgetExceededError(AsynDBTError):
    """A call would pass a hard cap of the budget. The call was not made.

    Attributes:
        cap: Name of the cap (``lm_calls``, ``tokens``, ``dollars``, …), or the empty string.
    """

    def __init__(self, message: str = "", *, cap: str = "") -> None:
        super().__init__(message)
        self.cap = cap


class WorkerFailedError(AsynDBTError):
    """One worker cannot go on (its LM fails again and again); the run goes on without it."""


class JournalError(AsynDBTError):
    """A ``run_dir`` or journal that cannot be written, read or continued. The message names the file and the remedy."""


class ResumeError(JournalError):
    """The newest run of a ``run_dir`` is one of another program, data, metric or configuration.

    Attributes:
        differences: What differs, one sentence each.
    """

    def __init__(self, message: str, differences: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.differences = differences


class ArtifactError(AsynDBTError, ValueError):
    """A saved program that cannot be written, or that must not be loaded.

    Attributes:
        differences: What differs from what was expected, one sentence each; empty where the message says it all.
    """

    def __init__(self, message: str, differences: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.differences = differences


class ExportError(AsynDBTError, ValueError):
    """A prompt, program or chain that cannot be carried over exactly. The message gives the reason."""
