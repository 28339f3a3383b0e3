"""The notebook in docs/ runs from top to bottom, and stands in the repository with its outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def _printed(notebook: nbformat.NotebookNode) -> list[str]:
    return [
        "".join(out.get("text", "") for out in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_stands_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    printed = _printed(notebook)
    assert "it_per_s" in printed[1]
    assert "perplexity" in printed[2]
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    printed = _printed(notebook)
    assert "it_per_s" in printed[1]
    # 50 steps bring the perplexity well below that of a uniform guess over 1024 tokens.
    perplexity = float(printed[2].split("perplexity ")[1].split()[0])
    assert perplexity < 700
    assert "within 1e-4 of eager PyTorch's: True" in printed[-1]
