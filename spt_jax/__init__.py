"""Selective Prompt Tuning (arXiv 2406.18187): a frozen causal LM, a bank of soft prompts and a retriever, in JAX."""

__version__ = "0.1.0"
