"""OPT-125M on ConvAI2 with the paper's hyper-parameters: K = 4, P = 8, λ_sel = λ_con = 0.4 (arXiv 2406.18187).

ConvAI2's files are ParlAI's `train_self_original_no_cands.txt` (17,878 dialogues, 131,438 turns) and
`valid_self_original_no_cands.txt` (1,000 dialogues, 7,801 turns). ParlAI's own downloader fetches them from
http://parl.ai/downloads/convai2/convai2_fix_723.tgz; unpack that, or run `parlai display_data -t convai2`.

    pip install '.[hub]'
    spt-jax train --config=configs/convai2_opt_125m.py --workdir=runs/convai2_opt_125m \
        --config.data.train=DIR/train_self_original_no_cands.txt \
        --config.data.test=DIR/valid_self_original_no_cands.txt
    spt-jax evaluate --workdir=runs/convai2_opt_125m

The frozen weights (125 M parameters, 0.5 GB in float32) fit on one device. More devices share the rows of a
step; their number divides data.batch. For NVIDIA GPUs install '.[cuda,hub]', for TPUs '.[tpu,hub]'.

The paper's figures for OPT-125M-SPT on the validation file (its own program and scorers, not measured here):

    F1 11.06 · BLEU 2.22 · ROUGE-1 16.45 · ROUGE-2 3.60 · ROUGE-L 15.42 · BERT F1 54.86 · DIST-1 4.87 · DIST-2 17.38

and for OPT-125M-PT, a single soft prompt: F1 10.79 · BLEU 1.61 · ROUGE-L 13.25 · DIST-1 3.94 · DIST-2 13.67.

What differs from the authors' run: rows are packed dialogues, so a step of 8 dialogues holds about 59 turns where
theirs held 2; the bank starts from token embeddings; selection sees the context alone; the LM's own dropout is off.
"""

from spt_jax.config import default_config


def get_config():
    """The configuration."""
    config = default_config()
    config.model.source = "facebook/opt-125m"
    config.model.dtype = "float32"
    config.model.remat = "none"
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
