"""Leaving out what a batch doesn't need: `sparsity` says what."""
