"""The DSPy side: a student becomes blocks and arms, a candidate a program, a rollout a score."""
