"""Gemma 3 on ConvAI2: K = 4 prompts of P = 8 tokens, the paper's weights for small models.

ConvAI2's files are ParlAI's `train_self_original_no_cands.txt` (17,878 dialogues, 131,438 turns) and
`valid_self_original_no_cands.txt` (1,000 dialogues, 7,801 turns). ParlAI's own downloader fetches them from
http://parl.ai/downloads/convai2/convai2_fix_723.tgz; unpack that, or run `parlai display_data -t convai2`.
The weights are gated: accept the terms on https://huggingface.co/google/gemma-3-1b-pt, then `hf auth login`.

    pip install '.[hub]'
    spt-jax train --config=configs/convai2_gemma3.py --workdir=runs/convai2_gemma3 \
        --config.data.train=DIR/train_self_original_no_cands.txt \
        --config.data.test=DIR/valid_self_original_no_cands.txt
    spt-jax evaluate --workdir=runs/convai2_gemma3

--config=configs/convai2_gemma3.py:270m takes the smaller model, 4b the text part of the larger one; the default is
1b, whose frozen weights take 2.0 GB in bfloat16 and fit on one device. For NVIDIA GPUs install '.[cuda,hub]', for
TPUs '.[tpu,hub]'.

Five layers of six see the last 512 tokens (1,024 in 4b), soft prompt included. ConvAI2's dialogues are shorter (403
tokens at most with a vocabulary of 49,152), so the soft prompt stays in sight.

The paper has no figures for this LM. Learning rate, epochs, row length, temperatures and loss weights are those of the
authors' published command for OPT-125M, and were not tuned on this data.
"""

from spt_jax.config import default_config
from spt_jax.errors import UserError, nearest

SIZES = ("270m", "1b", "4b")


def get_config(size: str = "1b"):
    """The configuration for one of `SIZES`."""
    if size not in SIZES:
        raise UserError(f"the size is {size!r}; allowed: {', '.join(SIZES)}.{nearest(size, SIZES)}")
    config = default_config()
    config.model.source = "google/gemma-3-270m" if size == "270m" else f"google/gemma-3-{size}-pt"
    config.model.dtype = "bfloat16"
    config.model.remat = "full" if size == "4b" else "dots"
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
