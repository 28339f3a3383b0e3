"""Text from an exported decoder."""
