"""From text to a model's batches."""
