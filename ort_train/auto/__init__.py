"""`backend="auto"`: the first real batches decide what runs the others."""
