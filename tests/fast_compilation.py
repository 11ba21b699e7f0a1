"""Flags of XLA with which programs compile fast and run slowly: tests compile many, and run each of them briefly."""

from __future__ import annotations

import importlib.metadata

FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # halves the time of compilation; later versions refuse to know it
    FLAGS += " --xla_cpu_parallel_codegen_split_count=1"  # a module in one piece: 30 % less, if not on idle cores
