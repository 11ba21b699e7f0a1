"""Working directories in object stores: local copies that a bucket is kept equal to."""
