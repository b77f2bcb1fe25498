"""The shipped server and engine on a virtual clock, with made-up workers: what asynchrony gains, what a run would take."""

from asyndbt_dspy.simulation.cost import measure_server
from asyndbt_dspy.simulation.replay import replay_server
from asyndbt_dspy.simulation.stragglers import Case, Outcome, run_case

__all__ = ["Case", "Outcome", "measure_server", "replay_server", "run_case"]
