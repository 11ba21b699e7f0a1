"""Decoder families as data: fields of their configurations, names of their tensors."""
