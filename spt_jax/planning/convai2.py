"""The size of ConvAI2's training set, for plans of runs whose data are not here."""

CONVAI2 = {"dialogues": 17_878, "turns": 131_438, "longest": 512, "mean_targets": 15}
"""Dialogues, turns, tokens of the longest row, and target tokens of a turn on average."""

MEAN_LENGTHS = {"dialogue": 270, "turn": 174}
"""Tokens of a row on average, for each ``data.layout``."""
