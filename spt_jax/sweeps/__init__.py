"""Sweeps over a configuration's options: many workers, one storage, no trial lost and none run twice."""
