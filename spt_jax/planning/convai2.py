"""The size of ConvAI2's training set, for plans of runs whose data are not here."""

CONVAI2 = {"dialogues": 17_878, "turns": 131_438, "mean_length": 270, "longest": 512, "mean_targets": 15}
"""Rows, turns, tokens of a row on average, of the longest, and target tokens of a turn; see docs/plan.md."""
