"""Built graphs on disk, and what they depend on."""
