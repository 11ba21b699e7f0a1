"""The paper's ablation of K, the number of soft prompts in the bank, over three seeds.

python launch/sweep.py --sweep=configs/sweeps/num_prompts.py --out=runs/num_prompts --jobs=2
"""

from optuna.distributions import CategoricalDistribution

from spt_jax.sweeps.description import Sweep


def get_sweep():
    """Five trials of three runs each; K = 1 is prompt tuning without a choice."""
    return Sweep(
        base="../quickstart.py",
        fixed={"train.evaluate_every": 6},
        space={"bank.num_prompts": CategoricalDistribution([1, 2, 4, 8, 16])},
        sampler="grid",
        seeds=(0, 1, 2),
    )
