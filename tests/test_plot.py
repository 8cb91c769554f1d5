"""Pictures: what is in them, text that is drawn as it is, and what they refuse."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers
from jaxformers import (
    ALiBi,
    LinearScaling,
    RotaryPositionalEncoding,
    SinusoidalPositionalEncoding,
    T5PositionBias,
    Transformer,
    TransformerLM,
    attention_maps,
)
from jaxformers.inspect import head_attribution, logit_lens
from jaxformers.positions.scaling import ProportionalScaling

matplotlib = pytest.importorskip("matplotlib")
from matplotlib import style  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from jaxformers.plot import (  # noqa: E402
    attention_grid,
    head_heat_map,
    logit_lens_table,
    loss_curve,
    position_bias,
    position_vectors,
    rotary_angles,
    token_labels,
)
from jaxformers.plot.labels import as_it_is, visible  # noqa: E402

KEY = jax.random.key(3)
HARD = ["$x$", " the", "\n", "100%", "a_b", "\\alpha", "日本", "", "z" * 40, "{", "^2", "\ud800"]


def weights(*shape, seed=0):
    x = np.random.default_rng(seed).random(shape)
    return x / x.sum(-1, keepdims=True)


def texts(figure):
    return [x.get_text() for x in figure.findobj(Text) if x.get_text()]


def labels_of(axis):
    return [x.get_text() for x in axis.get_ticklabels()]


def letters(ids):
    return [chr(65 + i) for i in ids]


def test_attention_of_a_padded_row():
    model = TransformerLM(19, 12, 3, 2, 20, 6, key=KEY)
    tokens = jnp.array([[1, 2, 3, 4, 5], [0, 0, 6, 7, 8]])
    real = tokens > 0
    maps = attention_maps(model, tokens, padding_mask=real)
    figure = attention_grid(
        maps, ["<pad>", "<pad>", "a", " b", "$c$"], row=1, padding_mask=real, heads=[0, 2]
    )
    axes = figure.axes[0]
    drawn = [image.get_array() for image in axes.images]
    expected = [maps[i][1, j, 2:, 2:] for i in (0, 1) for j in (0, 2)]
    np.testing.assert_array_equal(drawn, np.array(expected))
    assert labels_of(axes.yaxis) == labels_of(axes.xaxis) == ["a", "␣b", "$c$"] * 2
    names = [f"layer {i}, head {j}" for i in (0, 1) for j in (0, 2)]
    assert [x for x in texts(figure) if x.startswith("layer")] == names
    mask_of_the_row = attention_grid(maps, row=1, padding_mask=real[1], layers=[1])
    assert labels_of(mask_of_the_row.axes[0].yaxis) == ["2", "3", "4"]
    assert len(mask_of_the_row.axes[0].images) == 3


def test_attention_to_a_source():
    model = Transformer(17, 17, 12, 3, 1, 1, 20, 6, key=KEY)
    maps = attention_maps(model, jnp.array([[1, 2, 3, 4]]), jnp.array([[5, 6]]))
    real = np.array([True, True, True, False])
    figure = attention_grid(maps["cross"], list("xy"), list("abcd"), key_padding_mask=real)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[1].get_array(), maps["cross"][0][0, 1, :, :3])
    assert labels_of(axes.xaxis) == list("abc") * 3 and labels_of(axes.yaxis) == list("xy")
    with pytest.raises(ValueError, match=r'one of maps\["encoder"\]'):
        attention_grid(maps)


@pytest.mark.parametrize(("heads", "rows", "columns"), [(1, 1, 1), (6, 2, 4), (32, 4, 8)])
def test_the_heads_of_one_layer_are_wrapped(heads, rows, columns):
    figure = attention_grid(weights(heads, 2, 2), ["$\\frac$", "b"])
    axes = figure.axes[0]
    assert labels_of(axes.yaxis) == ["$\\frac$", "b"] * rows
    assert len(labels_of(axes.xaxis)) == 2 * columns and len(axes.images) == heads
    places = {tuple(np.round(image.get_extent(), 3)) for image in axes.images}
    assert len(places) == heads
    assert f"head {heads - 1}" in texts(figure)


def test_tokens_are_drawn_as_they_are(monkeypatch, tmp_path):
    """Warnings about characters without a picture are errors here, as is a broken formula."""
    monkeypatch.setattr("jaxformers.plot.labels.MANY_SCRIPTS", ("DejaVu Sans",))
    tokens = [*HARD, "$\\frac$"]
    n = len(tokens)
    figure = attention_grid(weights(1, n, n), tokens, title="$\\frac$", save=tmp_path / "x.svg")
    shown = ["$x$", "␣the", "\\n", "100%", "a_b", "\\alpha", "\\u65e5\\u672c", "∅", "z" * 15 + "…"]
    assert labels_of(figure.axes[0].yaxis)[:9] == shown
    assert "\\ud800" in texts(figure)
    assert visible("日本日", longest=14) == "\\u65e5\\u672c…"
    with matplotlib.rc_context({"font.family": "STIXSizeOneSym"}):  # a font of few characters
        assert visible("café") == "café"
        figure = Figure()
        figure.text(0, 0, "café", **as_it_is())
        figure.draw_without_rendering()


def test_nothing_overlaps_or_is_cut_off():
    n = 40
    tokens = [HARD[i % len(HARD)] for i in range(n)]
    figure = attention_grid(weights(2, n, n), tokens, title="forty")
    renderer = FigureCanvasAgg(figure).get_renderer()
    page = figure.bbox.padded(1)
    for axis, side in ((figure.axes[0].yaxis, "y"), (figure.axes[0].xaxis, "x")):
        boxes = [x.get_window_extent(renderer) for x in axis.get_ticklabels()]
        assert all(page.contains(*box.min) and page.contains(*box.max) for box in boxes)
        ends = sorted((getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in boxes)
        overlaps = [a[1] - b[0] for a, b in zip(ends, ends[1:], strict=False)]
        assert max(overlaps) < 2  # pixels, of the empty room in letters


def test_logit_lens():
    model = TransformerLM(19, 12, 3, 2, 20, 6, key=KEY)
    tokens = jnp.array([[1, 2, 3], [4, 5, 0]])
    real = tokens > 0
    logits = logit_lens(model, tokens, padding_mask=real)
    labels = token_labels(tokens[1], letters)
    figure = logit_lens_table(logits, letters, labels, row=1, padding_mask=real, title="$a$")
    axes = figure.axes[0]
    probabilities = jax.nn.softmax(logits, -1)[:, 1, :2]
    np.testing.assert_allclose(axes.images[0].get_array(), probabilities.max(-1), rtol=1e-5)
    words = {tuple(map(int, x.get_position())): x.get_text() for x in axes.texts}
    best = np.asarray(probabilities.argmax(-1))
    assert words == {(x, y): letters([best[y, x]])[0] for x in (0, 1) for y in (0, 1, 2)}
    assert labels_of(axes.xaxis) == ["E", "F"]
    assert labels_of(axes.yaxis) == ["embedded", "0", "1"]
    assert axes.get_ylim() == (-0.5, 2.5)  # the last layer is at the top
    with pytest.raises(ValueError, match="finite"):
        logit_lens_table(logits * np.nan, letters)


def test_labels_by_a_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "a": 1, "Ġb": 2}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    files = {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": b"{}"}
    tokenizer = jaxformers.Tokenizer(files)
    assert token_labels(jnp.array([1, 2, 0]), tokenizer) == ["a", " b", "</s>"]
    logits = np.eye(3, dtype=np.float32)[None]
    figure = logit_lens_table(logits, tokenizer)
    assert [x.get_text() for x in figure.axes[0].texts] == ["</s>", "a", "␣b"]


def test_numbers_of_heads_are_colored_around_zero():
    values = np.array([[1.0, -4.0, 0.0], [2.0, np.nan, 3.0]], np.float32)
    (axes, bar) = head_heat_map(values, "50$ of $\\frac$", title="heads").axes
    (image,) = axes.images
    assert image.norm.vmin == -4 and image.norm.vmax == 4
    assert to_rgba("white") == pytest.approx(tuple(image.to_rgba(0.0)), abs=0.02)
    assert image.get_array().shape == (2, 3) and bar.get_ylabel() == "50$ of $\\frac$"
    assert head_heat_map(np.zeros((1, 1), np.float32)).axes[0].images[0].norm.vmax == 1
    model = TransformerLM(19, 12, 3, 2, 20, 6, key=KEY)
    found = head_attribution(model, jnp.array([[1, 2]]), jnp.array([[2, 3]]))
    assert head_heat_map(found.mean((2, 3))).axes[0].get_ylabel() == "layer"


def test_vectors_of_positions():
    scheme = SinusoidalPositionalEncoding(9, 4)
    (axes, _) = position_vectors(scheme).axes
    np.testing.assert_allclose(axes.images[0].get_array().T, scheme(9))
    assert position_vectors(scheme, 5).axes[0].images[0].get_array().shape == (4, 5)


def test_angles_of_rotary_positions():
    figure = rotary_angles(RotaryPositionalEncoding(100.0, scaling=LinearScaling(2.0)), 4, 7)
    angles, waves = figure.axes[:2]
    frequencies = np.array([1.0, 0.1]) / 2
    cosines = np.cos(np.arange(7) * frequencies[:, None])
    np.testing.assert_allclose(angles.images[0].get_array(), cosines, rtol=1e-5)
    by_name = {line.get_label(): line.get_xdata() for line in waves.lines}
    np.testing.assert_allclose(by_name["wavelength"], 2 * np.pi / frequencies, rtol=1e-5)
    np.testing.assert_allclose(by_name["without scaling"], np.pi / frequencies, rtol=1e-5)
    still = rotary_angles(RotaryPositionalEncoding(scaling=ProportionalScaling(0.5)), 8)
    assert "2 pairs do not rotate" in texts(still)
    assert (
        len(rotary_angles(RotaryPositionalEncoding(rotary_dim=6), 8).axes[1].lines[0].get_xdata())
        == 3
    )


def test_biases_of_positions():
    lines = position_bias(ALiBi(), 2, 4, causal=True).axes[0].lines
    np.testing.assert_allclose(lines[0].get_xdata(), [-3, -2, -1, 0])
    np.testing.assert_allclose(lines[1].get_ydata(), np.array([-3, -2, -1, 0]) / 2**8)
    scheme = T5PositionBias(20, key=KEY)
    axes, _ = position_bias(scheme, 20, 6).axes
    assert axes.lines[3].get_ydata()[5] == scheme.weight[0, 3]
    causal = position_bias(scheme, 20, 64, causal=True).axes[0].lines[3].get_ydata()
    assert causal[0] == scheme.weight[26, 3]  # of 32 buckets for keys before the query
    np.testing.assert_allclose(axes.lines[0].get_xdata(), np.arange(-5, 6))


def write_log(directory, losses, evaluations=()):
    directory.mkdir()
    rows = [{"step": i, "loss": x} for i, x in enumerate(losses, 1)]
    rows += [{"step": i, "eval_loss": x} for i, x in enumerate(evaluations, 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_curves_of_several_runs(tmp_path):
    a = write_log(tmp_path / "a_$\\frac$", np.linspace(3, 2, 150).tolist(), [4.0])
    b = write_log(tmp_path / "b", [None, 3.0, 2.5])
    axes = loss_curve([a, b / "metrics.jsonl"]).axes[0]
    assert axes.get_yscale() == "linear"
    colors = [to_rgba(line.get_color()) for line in axes.lines]
    assert len(colors) == 4 and len(set(colors[:3])) == 1 and colors[3] != colors[0]
    figure = loss_curve({"first $": a, "b": b}, tmp_path / "new" / "x.pdf")
    names = [x.get_text() for x in figure.legends[0].get_texts()]
    assert names == ["first $, training", "first $, evaluation", "b, training"]
    assert (tmp_path / "new" / "x.pdf").read_bytes().startswith(b"%PDF")
    names = [x.get_text() for x in loss_curve({"_a": a, "b": b}).legends[0].get_texts()]
    assert names == [" _a, training", " _a, evaluation", "b, training"]
    other = write_log(tmp_path / "new" / "b", [1.0])
    names = [x.get_text() for x in loss_curve([b, other]).legends[0].get_texts()]
    assert names == [f"{b}, training", f"{other}, training"]
    with pytest.raises(ValueError, match="different logs"):
        loss_curve([b, b])


def test_losses_over_more_than_a_decade_have_a_logarithmic_axis(tmp_path):
    a = write_log(tmp_path / "a", [5.0, 1.0, 0.4])
    (axes,) = loss_curve(a).axes
    assert axes.get_yscale() == "log"
    b = write_log(tmp_path / "b", [5.0, 1.0, -0.1])
    assert loss_curve(b).axes[0].get_yscale() == "linear"


def test_the_look_is_that_of_the_style(tmp_path):
    before = dict(matplotlib.rcParams)
    with style.context("dark_background"):
        figure = head_heat_map(np.array([[1.0, -1.0]], np.float32), "x")
    assert dict(matplotlib.rcParams) == before
    figure.savefig(tmp_path / "later.png")
    (axes, bar) = figure.axes
    assert to_rgba(axes.get_xticklabels()[0].get_color()) == to_rgba("white")
    assert to_rgba(bar.get_yticklabels()[0].get_color()) == to_rgba("white")
    assert to_rgba("black") == pytest.approx(tuple(axes.images[0].to_rgba(0.0)), abs=0.02)
    assert figure._repr_png_().startswith(b"\x89PNG")


A = weights(2, 3, 4, 4)  # b, n, t, s


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: attention_grid([]), "maps must be a list of arrays"),
        (lambda: attention_grid([A, A[:, :, 1:]]), "may differ only in the number of heads n"),
        (lambda: attention_grid(A[0, 0]), r"got \(4, 4\)"),
        (lambda: attention_grid(A * 9), "from 0 to 1 at all real tokens"),
        (lambda: attention_grid(A * np.nan), "from 0 to 1 at all real tokens"),
        (lambda: attention_grid(A, list("abc")), "tokens must have one string for each of 4"),
        (lambda: attention_grid(A, "abcd"), "tokens must be a list of strings, got 'abcd'"),
        (lambda: attention_grid(A, [1, 2, 3, 4]), r"token_labels\(ids, tokenizer\)"),
        (lambda: attention_grid(A, list("abcd"), list("abc")), "keys must have one string"),
        (lambda: attention_grid(A, row=2), "row must be an integer from 0 to 1, got 2"),
        (lambda: attention_grid(A[0], row=1), "from 0 to 0"),
        (lambda: attention_grid(A, heads=[3]), "heads must be a list of numbers from 0 to 2"),
        (lambda: attention_grid([A], layers=[-1]), "layers must be a list of numbers from 0 to 0"),
        (lambda: attention_grid(A, heads=[]), "heads must be a list"),
        (lambda: attention_grid(A, heads=[True, False, True]), "heads must be a list"),
        (lambda: attention_grid(A, heads=np.array([[0, 1]])), "heads must be a list"),
        (lambda: attention_grid(A, save="plots/"), "a file with a type, such as x.png"),
        (lambda: attention_grid(A, padding_mask=np.ones((2, 3), bool)), "padding_mask must be"),
        (lambda: attention_grid(A, padding_mask=np.zeros(4, bool)), "padding alone"),
        (lambda: attention_grid(A, key_padding_mask=np.ones(4)), "key_padding_mask must be"),
        (lambda: logit_lens_table(A[0, 0], letters), r"\(layers \+ 1, b, t, v\)"),
        (lambda: logit_lens_table(A, "abcd"), "vocabulary must be a function"),
        (lambda: logit_lens_table(A, str), "the result of vocabulary must be a list of strings"),
        (lambda: logit_lens_table(A, lambda ids: ["a"] * 9), "the result of vocabulary must have"),
        (lambda: logit_lens_table(A, letters, ["a"]), "tokens must have one string for each of 4"),
        (lambda: token_labels([[1, 2]], letters), "one row of ids"),
        (lambda: head_heat_map(A), r"values.mean\(\(2, 3\)\)"),
        (lambda: head_heat_map(np.ones((0, 3))), r"\(layers, heads\), not empty"),
        (lambda: position_vectors(ALiBi()), "Draw others with position_bias"),
        (lambda: position_vectors(SinusoidalPositionalEncoding(9, 4), 10), "at most max_seq"),
        (lambda: position_bias(ALiBi, 4), "a scheme that gives biases, as an object"),
        (lambda: position_bias(T5PositionBias(3, key=KEY), 4), "for 3 heads, got 4"),
        (lambda: rotary_angles(ALiBi()), "must be a RotaryPositionalEncoding"),
        (lambda: rotary_angles(RotaryPositionalEncoding(), 5), "must be even"),
        (lambda: loss_curve([]), "at least one log"),
        (lambda: loss_curve(None), "at least one log"),
        (lambda: loss_curve({"a": 5}), "at least one log"),
        (lambda: loss_curve("nowhere"), "no log to read"),
    ],
)
def test_what_is_refused(no_shape_checker, draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_a_missing_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jaxformers.plot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxformers\[train\]'"):
        import jaxformers.plot  # noqa: F401
