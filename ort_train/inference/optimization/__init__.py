"""Graph passes on a model on disk, and what they bring."""
