"""Prompts and generation by several engines, held against eager: `ort-train bench-inference`."""
