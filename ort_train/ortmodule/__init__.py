"""ORTModule on today's torch and transformers: the only package that knows it.

`options` what can be chosen; `forward` takes over a module's training forward; `engine` is one
training graph; `upstream` imports ORTModule and mends it; `backward` refuses what it gets wrong;
`profiling` says where a graph's time goes. In rooms of their own: `export` from a module to ONNX,
`sparse` tokens that are left out, `passes` what is done to a finished graph, `kernels` what torch
computes in it, `cache` built graphs on disk, `triton` fusion on GPUs.
"""

from ort_train.ortmodule.options import OrtOptions

__all__ = ["OrtOptions"]
