"""What a graph holds as constants, and whether the module still says the same."""
