"""What a checkpoint is worth: figures, tables and pictures."""
