"""Qwen3 on ConvAI2: K = 4 prompts of P = 8 tokens, the paper's weights for small models.

ConvAI2's files are ParlAI's `train_self_original_no_cands.txt` (17,878 dialogues, 131,438 turns) and
`valid_self_original_no_cands.txt` (1,000 dialogues, 7,801 turns). ParlAI's own downloader fetches them from
http://parl.ai/downloads/convai2/convai2_fix_723.tgz; unpack that, or run `parlai display_data -t convai2`.

    pip install '.[hub]'
    spt-jax train --config=configs/convai2_qwen3.py --workdir=runs/convai2_qwen3 \
        --config.data.train=DIR/train_self_original_no_cands.txt \
        --config.data.test=DIR/valid_self_original_no_cands.txt
    spt-jax evaluate --workdir=runs/convai2_qwen3

--config=configs/convai2_qwen3.py:SIZE takes another size of the base model: 0.6B, 1.7B (the default), 4B, 8B or 14B.
Qwen3 has no token that begins a text, so rows begin with the persona. The frozen weights of 1.7B take 3.4 GB in
bfloat16 and fit on one device; for 8B and 14B share them with --config.mesh.fsdp=N, N a divisor of data.batch. For
NVIDIA GPUs install '.[cuda,hub]', for TPUs '.[tpu,hub]'.

The paper has no figures for this LM. Learning rate, epochs, row length, temperatures and loss weights are those of the
authors' published command for OPT-125M, and were not tuned on this data.
"""

from spt_jax.config import default_config
from spt_jax.errors import UserError, nearest

SIZES = ("0.6B", "1.7B", "4B", "8B", "14B")


def get_config(size: str = "1.7B"):
    """The configuration for one of `SIZES`."""
    if size not in SIZES:
        raise UserError(f"the size is {size!r}; allowed: {', '.join(SIZES)}.{nearest(size, SIZES)}")
    config = default_config()
    config.model.source = f"Qwen/Qwen3-{size}-Base"
    config.model.dtype = "bfloat16"
    config.model.remat = "dots" if size in ("0.6B", "1.7B") else "full"
    config.bank.num_prompts = 4
    config.bank.prompt_length = 8
    config.objective.selection_weight = 0.4
    config.objective.contrastive_weight = 0.4
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
    return config
