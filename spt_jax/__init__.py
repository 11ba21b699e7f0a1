"""Selective Prompt Tuning (arXiv 2406.18187) for TPUs and GPUs: a frozen causal LM, a bank of soft prompts, a retriever."""

__version__ = "0.1.0"
