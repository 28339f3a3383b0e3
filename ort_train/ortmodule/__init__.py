"""ORTModule on today's torch and transformers: the only package that knows it.

`options` what can be chosen; `forward` takes over a module's training forward; `engine` is one
exported graph; `upstream` imports ORTModule and mends it, `exporter` what it exports with; `aten`
runs torch operators for ONNX Runtime; `symbolics` and `gradients` are the operators that upstream
lacks; `graph_passes` lists what is done to a finished graph; `profiling` says where a graph's time
goes, and `peak` what speed its products could have.
"""

from ort_train.ortmodule.options import OrtOptions

__all__ = ["OrtOptions"]
