"""What a build leaves in memory that no step needs: given back before the first step fills it up.

ORTModule keeps its exported graph twice, and ONNX Runtime's builder two more, for a second export
that doesn't happen here: another kind of call has a graph of its own. Small blocks of all of them
lie scattered over the heap, among what stays, and a step's larger ones don't fit between.
"""

from __future__ import annotations

import gc
from typing import Any

from ort_train.ortmodule.kernels import memory


def release(manager: Any) -> None:
    """Drop the graphs that led to the one that runs.

    Args:
        manager: ORTModule's TrainingManager, whose session stands.
    """
    transition = manager._graph_transition_manager
    transition._exported_model_info.exported_model = None
    transition._post_export_processed_model_info._post_export_processed_model = None
    manager._graph_builder = None
    gc.collect()  # the exporter's objects, which refer to each other: 12 MiB for six layers
    memory.trim()
