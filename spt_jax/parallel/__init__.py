"""The device mesh and which axis of an array it shards."""
