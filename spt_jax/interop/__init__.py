"""Trained runs in and out: the authors' checkpoints, PEFT adapters."""
