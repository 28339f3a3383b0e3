"""Narrower weights: int4, int8 and fp16, each model held against its original."""
