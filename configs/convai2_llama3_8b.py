"""Llama-3-8B on ConvAI2 with the paper's hyper-parameters for Llama-2-7B: K = 4, P = 1, λ_sel = λ_con = λ_fus = 1.

ConvAI2's files are ParlAI's `train_self_original_no_cands.txt` (17,878 dialogues, 131,438 turns) and
`valid_self_original_no_cands.txt` (1,000 dialogues, 7,801 turns). ParlAI's own downloader fetches them from
http://parl.ai/downloads/convai2/convai2_fix_723.tgz; unpack that, or run `parlai display_data -t convai2`.
The weights are gated: ask for access on https://huggingface.co/meta-llama/Meta-Llama-3-8B, then `hf auth login`.

    pip install '.[cuda,hub]'
    spt-jax train --config=configs/convai2_llama3_8b.py --workdir=runs/convai2_llama3_8b \
        --config.data.train=DIR/train_self_original_no_cands.txt \
        --config.data.test=DIR/valid_self_original_no_cands.txt
    spt-jax evaluate --workdir=runs/convai2_llama3_8b

Eight devices share the frozen weights (8.03 G parameters, 16.1 GB in bfloat16). On another number of devices give
--config.mesh.fsdp=N, with N a divisor of data.batch; on one device --config.mesh.fsdp=1.

The paper has no figures for this LM; configs/convai2_llama2_7b.py lists those of Llama-2-7B. What differs from there is
the LM alone. The learning rate was not tuned on this data.
"""

from spt_jax.config import default_config


def get_config():
    """The configuration."""
    config = default_config()
    config.model.source = "meta-llama/Meta-Llama-3-8B"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.bank.num_prompts = 4
    config.bank.prompt_length = 1
    config.objective.selection_weight = 1.0
    config.objective.contrastive_weight = 1.0
    config.objective.fusion_weight = 1.0
    # ParlAI's files, in the folder where the command runs unless the command line names others.
    config.data.train = "train_self_original_no_cands.txt"
    config.data.test = "valid_self_original_no_cands.txt"
    config.data.development_dialogues = 200
    config.data.batch = 8
    config.data.max_length = 512
    config.optimizer.learning_rate = 1e-4
    config.train.epochs = 1
    config.train.evaluate_every = 500
    config.train.save_every = 250
    config.evaluation.batch = 64
    config.mesh.fsdp = 8
    return config
