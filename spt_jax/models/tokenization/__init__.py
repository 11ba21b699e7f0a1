"""Text to token ids and back, from whatever files describe a tokenizer."""
