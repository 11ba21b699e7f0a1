"""Llama-2-7B on ConvAI2 with the paper's hyper-parameters: K = 4, P = 1, λ_sel = λ_con = λ_fus = 1 (arXiv 2406.18187).

ConvAI2's files are ParlAI's `train_self_original_no_cands.txt` (17,878 dialogues, 131,438 turns) and
`valid_self_original_no_cands.txt` (1,000 dialogues, 7,801 turns). ParlAI's own downloader fetches them from
http://parl.ai/downloads/convai2/convai2_fix_723.tgz; unpack that, or run `parlai display_data -t convai2`.
The weights are gated: ask for access on https://huggingface.co/meta-llama/Llama-2-7b-hf, then `hf auth login`.

    pip install '.[cuda,hub]'
    spt-jax train --config=configs/convai2_llama2_7b.py --workdir=runs/convai2_llama2_7b \
        --config.data.train=DIR/train_self_original_no_cands.txt \
        --config.data.test=DIR/valid_self_original_no_cands.txt
    spt-jax evaluate --workdir=runs/convai2_llama2_7b

Eight devices share the frozen weights (6.74 G parameters, 13.5 GB in bfloat16). On another number of devices give
--config.mesh.fsdp=N, with N a divisor of data.batch; on one device --config.mesh.fsdp=1.

The paper's figures for Llama2-7B-SPT on the validation file (its own program and scorers, not measured here):

    F1 17.49 · BLEU 2.80 · ROUGE-1 17.02 · ROUGE-2 4.48 · ROUGE-L 15.24 · DIST-1 5.69 · DIST-2 22.86

and for Llama2-7B-PT, a single soft prompt: F1 17.12 · BLEU 1.99 · ROUGE-L 13.72 · DIST-1 2.80 · DIST-2 12.91.

What differs from the authors' run: rows are packed dialogues, so a step of 8 dialogues holds about 59 turns; the bank
starts from token embeddings; selection sees the context alone. Learning rate, epochs, row length and temperatures are
those of the authors' published command for OPT-125M; their command for Llama-2 is not published.
"""

from spt_jax.config import default_config


def get_config():
    """The configuration."""
    config = default_config()
    config.model.source = "meta-llama/Llama-2-7b-hf"
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
