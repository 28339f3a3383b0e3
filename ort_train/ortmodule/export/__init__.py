"""From a module to an ONNX graph: torch's exporter, and what it lacks or gets wrong."""
