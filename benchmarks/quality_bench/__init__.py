"""The quality benchmark's parts; ``benchmarks/quality.py`` is its command line.

tasks        programs, labels and data of each task
lms          the local LMs: one that answers, one that proposes
counting     what reaches an LM, counted by role; the counted metric
settings     the other optimizers' settings for each budget
optimizers   every optimizer by key
baselines    the paper's baselines
embeddings   sentence embeddings for nearest neighbours
cells        one run: key, row, resuming
incumbents   what AsynDBT would return along its run
statistics   intervals, paired tests, ranks
report       tables and the JSON line
plots        score against calls
verify       reruns of committed rows
"""
