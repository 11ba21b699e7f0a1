"""From rows to a checkpoint: optimizer, step, loop, checkpoints, tracking."""
