"""The paper's ablation of the loss weights λ: every combination of losses at full weight, at its λ of 0.4, and off.

python launch/sweep.py --sweep=configs/sweeps/lambdas.py --out=runs/lambdas --jobs=2
"""

from optuna.distributions import CategoricalDistribution

from spt_jax.sweeps.description import Sweep


def get_sweep():
    """Eighteen trials; the objective is the development perplexity of the prompt that the retriever selects."""
    return Sweep(
        base="../quickstart.py",
        fixed={"train.evaluate_every": 6},
        space={
            "objective.selection_weight": CategoricalDistribution([0.0, 0.4, 1.0]),
            "objective.contrastive_weight": CategoricalDistribution([0.0, 0.4, 1.0]),
            "objective.fusion_weight": CategoricalDistribution([0.0, 1.0]),
        },
        sampler="grid",
    )
