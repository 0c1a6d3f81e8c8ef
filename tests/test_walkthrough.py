"""walkthrough.ipynb runs, from the first cell to the last, as a class would run it."""
from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
ROOT = Path(__file__).parent.parent


def test_notebook_runs():
    notebook = nbformat.read(ROOT / "walkthrough.ipynb", 4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}})
    client.execute()  # raises with the cell's traceback; the cells assert what they claim
    said = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "from the first cell to here" in said
