"""Runs the notebooks as Jupyter does: python tests/run_notebooks.py --directory FILES [NAME ...]

They run in the directory FILES, which has what they read, such as the file of SmolLM2. A line of
text that is another than the one in the notebook is printed, since numbers differ a little from one
machine to another. An error in a cell is an error here. With --write the outputs are written into
the notebooks, without times and names that change from run to run. Needs nbclient and ipykernel.
"""

import argparse
import difflib
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def run(path, directory):
    """Returns the notebook with the outputs of a new run."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": directory}}).execute()
    print(f"{path.name} ({time.perf_counter() - start:.0f} s)", flush=True)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
    return notebook


def printed(notebook):
    """Returns the lines that the cells print."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [line for x in outputs for line in x.get("text", "").splitlines()]


def main():
    parser = argparse.ArgumentParser(description="runs the notebooks")
    parser.add_argument("--directory", metavar="FILES", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="write the outputs")
    parser.add_argument("names", nargs="*", help="such as quick_start; all by default")
    args = parser.parse_args()
    paths = [NOTEBOOKS / f"{name}.ipynb" for name in args.names]
    for path in paths or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = run(path, args.directory)
        before = printed(nbformat.read(path, as_version=4))
        for line in difflib.unified_diff(before, printed(notebook), lineterm="", n=0):
            print(f"  {line}")
        if args.write:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
