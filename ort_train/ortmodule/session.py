"""The settings of ONNX Runtime's session that runs a training graph."""

from __future__ import annotations

from typing import Any

import torch

from ort_train import distributed
from ort_train.ortmodule.options import OrtOptions


def default_num_threads() -> int:
    """This rank's share of the cores, or fewer where torch was told to use fewer."""
    return min(torch.get_num_threads(), distributed.cores_per_rank())


def configure(session_options: Any, options: OrtOptions) -> None:
    """Set threads, log level and profiling of an onnxruntime.SessionOptions, in place."""
    session_options.intra_op_num_threads = options.num_threads or default_num_threads()
    # Upstream passes its own scale, whose "fatal" is beyond ONNX Runtime's
    # (`_graph_execution_manager.py`, `_get_session_config`).
    session_options.log_severity_level = min(session_options.log_severity_level, 4)
    session_options.add_session_config_entry(
        "session.intra_op.allow_spinning", str(int(options.allow_spinning))
    )
    if options.profile_prefix is not None:
        session_options.enable_profiling = True
        session_options.profile_file_prefix = str(options.profile_prefix)
