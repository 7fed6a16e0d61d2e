"""One host's part of an epoch: dump | restore, mirrored halves."""
