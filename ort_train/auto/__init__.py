"""What `backend="auto"` may choose, how that is tried on the first batches, and the decision."""
