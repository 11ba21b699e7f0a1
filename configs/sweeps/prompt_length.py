"""P, the virtual tokens of one soft prompt, over three seeds.

python launch/sweep.py --sweep=configs/sweeps/prompt_length.py --out=runs/prompt_length --jobs=2
"""

from optuna.distributions import CategoricalDistribution

from spt_jax.sweeps.description import Sweep


def get_sweep():
    """Six trials of three runs each; the paper takes 8 for OPT and 1 for Llama-2-7B."""
    return Sweep(
        base="../quickstart.py",
        fixed={"train.evaluate_every": 6},
        space={"bank.prompt_length": CategoricalDistribution([1, 2, 4, 8, 16, 32])},
        sampler="grid",
        seeds=(0, 1, 2),
    )
