"""Measuring backends side by side, each in a fresh process: what `ort-train bench` does."""
