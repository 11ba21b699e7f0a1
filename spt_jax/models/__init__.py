"""The frozen causal LM: one decoder, many families as data, loaded from wherever it is."""
