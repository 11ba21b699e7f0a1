"""Learning rates of the bank and the retriever, by TPE with pruning, on the dialogues that ship with the package.

python launch/sweep.py --sweep=configs/sweeps/learning_rates.py --out=runs/learning_rates --jobs=2
"""

from optuna.distributions import FloatDistribution
from optuna.pruners import MedianPruner

from spt_jax.sweeps.description import Sweep


def get_sweep():
    """Twenty trials; a run is evaluated every quarter, and given up when it is worse than the median of the others."""
    return Sweep(
        base="../quickstart.py",
        fixed={"train.evaluate_every": 6},
        space={
            "optimizer.learning_rate": FloatDistribution(1e-3, 1e-1, log=True),
            "optimizer.retriever_factor": FloatDistribution(1e-2, 1.0, log=True),
        },
        sampler="tpe",
        num_trials=20,
        pruner=MedianPruner(n_startup_trials=5, n_warmup_steps=6),
    )
