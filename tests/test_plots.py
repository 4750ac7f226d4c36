"""Figures: what is drawn is what was given, in the promised order, and nothing overlaps."""

import io
import itertools
import operator
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from rbf_jax import RBFFilters, plots, saliency


def make_filters(count, channels, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.uniform(0, 1, (count, 3, 3, channels)).astype(np.float32)
    return RBFFilters(jnp.asarray(means), jnp.asarray(rng.uniform(0, 1, count).astype(np.float32)))


def make_images(count, channels=1, seed=0, size=8):
    return np.random.default_rng(seed).uniform(0, 1, (count, size, size, channels)).astype(np.float32)


def drawn(axes):
    """The data of the one image in these axes, with its channels."""
    (image,) = axes.images
    assert image.get_interpolation() == "nearest"
    assert image.get_clim() == (0, 1)
    data = np.asarray(image.get_array())
    return data if data.ndim == 3 else data[..., None]


def check_layout(figure):
    """Every text lies inside the figure, and no text or panel covers another text."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes_texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    texts = [t for t in (*axes_texts, *figure.texts) if t.get_text()]
    assert texts
    boxes = [text.get_window_extent(renderer) for text in texts]
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in zip(texts, boxes, strict=True):
        # A pixel of tolerance: extents are rounded.
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
        assert not any(box.padded(-1).overlaps(axes.get_window_extent(renderer)) for axes in figure.axes), text
    for (one, a), (other, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)


@pytest.mark.parametrize("order", ["brightness", "variance"])
@pytest.mark.parametrize(("count", "channels"), [(24, 1), (70, 3), (1, 1)])
def test_filters_are_all_drawn_in_order(count, channels, order):
    filters = make_filters(count, channels)
    means, variances = np.asarray(filters.means), np.asarray(filters.variances)
    figure = plots.filters(filters, order=order)
    assert len(figure.axes) == count
    key = [sum(map(float, mean.ravel())) for mean in means] if order == "brightness" else list(variances)
    ranks = sorted(range(count), key=lambda j: key[j])
    for axes, j in zip(figure.axes, ranks, strict=True):
        np.testing.assert_array_equal(drawn(axes), means[j])
        if count <= 64:
            assert float(axes.get_xlabel()) == pytest.approx(variances[j] ** 0.5, rel=0.06)
        else:
            assert axes.get_xlabel() == ""
    assert str(count) in figure.texts[0].get_text()
    check_layout(figure)


def test_filters_keep_the_number_of_columns_and_the_shape():
    rng = np.random.default_rng(0)
    means = jnp.asarray(rng.uniform(0, 1, (12, 2, 5, 3)), jnp.float32)
    figure = plots.filters(RBFFilters(means, jnp.zeros(12)), columns=5)
    lefts = [round(axes.get_position().x0, 6) for axes in figure.axes]
    assert lefts[:5] == sorted(set(lefts))
    assert lefts[5:10] == lefts[:5]
    box = figure.axes[0].get_window_extent()
    assert box.height / box.width == pytest.approx(2 / 5)


def test_hundreds_of_filters_fit_on_a_page():
    figure = plots.filters(make_filters(240, 3))
    assert len(figure.axes) == 240
    assert figure.get_figwidth() < 12
    assert figure.get_figheight() < 8


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_images_stand_where_they_belong(channels):
    rows = {
        "original": make_images(4, channels),
        "attacked, then reconstructed": make_images(4, channels, seed=1),
        "attacked further": make_images(4, channels, seed=2),
    }
    titled = {"attacked further": list("0123"), "original": ["7", "2", "airplane → automobile", "0"]}
    figure = plots.image_rows(rows, titles=titled)
    assert len(figure.axes) == 12
    for axes, image in zip(figure.axes, np.concatenate(list(rows.values())), strict=True):
        np.testing.assert_array_equal(drawn(axes), image)
    labels = [axes.get_ylabel().replace("\n", " ") for axes in figure.axes]
    assert [label for label in labels if label] == list(rows)
    assert [bool(label) for label in labels] == [True, False, False, False] * 3
    titles = [axes.get_title().replace("\n", " ") for axes in figure.axes]
    assert titles == ["7", "2", "airplane → automobile", "0", "", "", "", "", "0", "1", "2", "3"]
    check_layout(figure)


def test_many_columns_and_one_column_do_not_overlap():
    titles = {label: ["cat → dog"] * 25 for label in ("a", "b" * 15)}
    check_layout(plots.image_rows({label: make_images(25) for label in titles}, titles=titles))
    check_layout(
        plots.image_rows({"original": make_images(1)}, titles={"original": ["a rather long title of one image"]})
    )


def test_distances_are_the_points_and_the_titles_count_them():
    rng = np.random.default_rng(0)
    before = {norm: rng.uniform(0.1, scale, 101) for norm, scale in [("linf", 0.3), ("l2", 4.0), ("l1", 60.0)]}
    after = {norm: rng.uniform(0, 1.5, 101) * x for norm, x in before.items()}
    figure = plots.reconstruction_distances(before, dict(reversed(after.items())))
    assert len(figure.axes) == 3
    for axes, norm in zip(figure.axes, before, strict=True):
        x, y = before[norm], after[norm]
        (points,) = axes.collections
        np.testing.assert_allclose(np.asarray(points.get_offsets()), np.stack([x, y], -1))
        (diagonal,) = axes.lines
        np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_xlim()[1] > max(x.max(), y.max())
        title = axes.get_title()
        assert f"median ratio {sorted(y / x)[50]:.2f} (N = 101)" in title
        assert f"{100 * sum(b > a for a, b in zip(x, y, strict=True)) / 101:.1f}% above the diagonal" in title
    assert [axes.get_title().split(":")[0] for axes in figure.axes] == [r"$\ell_\infty$", r"$\ell_2$", r"$\ell_1$"]
    check_layout(figure)


def test_curves_are_the_points_under_one_legend():
    rng = np.random.default_rng(0)
    labels = ["CNN", "rCNN", "rCNN, no noise", "rCNN+", "rCNN+, no noise", "Madry", "rCNN-AT", "rCNN-AT, beta2 1"]
    panels = {
        norm: {label: (np.linspace(0, size, 5), rng.uniform(20, 90, 5)) for label in labels[skip:]}
        for norm, size, skip in [("linf", 0.3, 1), ("l2", 4, 0), ("other", 60, 2)]
    }
    figure = plots.curves(panels, "epsilon", "accuracy (%)")
    assert len(figure.axes) == 3
    looks = {}
    for axes, lines in zip(figure.axes, panels.values(), strict=True):
        assert axes.get_xlabel() == "epsilon"
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 90
        for line, (label, (x, y)) in zip(axes.lines, lines.items(), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([x, y], -1))
            looks.setdefault(label, set()).add((line.get_marker(), line.get_linestyle(), line.get_color()))
    assert [axes.get_title() for axes in figure.axes] == [r"$\ell_\infty$", r"$\ell_2$", "other"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy (%)", "", ""]
    (legend,) = figure.legends
    shown = dict(zip((text.get_text() for text in legend.get_texts()), legend.get_lines(), strict=True))
    assert sorted(shown) == sorted(labels)
    for label, found in looks.items():
        assert found == {(shown[label].get_marker(), shown[label].get_linestyle(), shown[label].get_color())}
    assert len({(marker, dash) for ((marker, dash, _),) in looks.values()}) == len(labels)  # without colour
    check_layout(figure)
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 < min(axes.xaxis.label.get_window_extent().y0 for axes in figure.axes)


def test_a_logarithmic_axis_has_plain_numbers():
    figure = plots.curves({"l2": {"CNN": ([1, 10, 1000], [90, 50, 40])}}, "steps", "accuracy (%)", log=True)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert {"1", "10", "100", "1000"} <= {text.get_text() for text in axes.get_xticklabels()}
    check_layout(figure)


def test_equal_inputs_have_no_ratio_but_are_shown():
    figure = plots.reconstruction_distances({"l2": [0.0, 1.0, 2.0, 4.0]}, {"l2": [0.5, 0.5, 3.0, 4.0]})
    title = figure.axes[0].get_title()
    assert "median ratio 1.00 (N = 3 of 4)" in title  # 0.5, 1.5, 1
    assert "33.3% above" in title  # a point on the diagonal is not above it
    assert len(np.asarray(figure.axes[0].collections[0].get_offsets())) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_saliency_shows_each_model_beneath_its_image(channels):
    images = make_images(3, channels)
    rng = np.random.default_rng(5)
    # A model may be called "image", as the first row is.
    maps = {
        name: rng.normal(size=images.shape).astype(np.float32) * scale for name, scale in [("image", 1e-3), ("b", 9)]
    }
    figure = plots.saliency(images, maps)
    assert len(figure.axes) == 9
    expected = [*images, *(picture for gradients in maps.values() for picture in saliency.as_picture(gradients))]
    for axes, picture in zip(figure.axes, expected, strict=True):
        np.testing.assert_allclose(drawn(axes), picture, atol=1e-6)
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["image", "image", "b"]
    check_layout(figure)


def test_saliency_tells_the_signs_apart():
    gradients = np.zeros((1, 8, 8, 1), np.float32)
    gradients[0, 2, 2], gradients[0, 5, 5] = 1, -1
    figure = plots.saliency(make_images(1), {"model": gradients})
    (image,) = figure.axes[1].images
    red, green, blue = np.moveaxis(image.to_rgba(np.asarray(image.get_array()))[..., :3], -1, 0)
    assert red[2, 2] > 2 * blue[2, 2]
    assert blue[5, 5] > 2 * red[5, 5]
    np.testing.assert_allclose([red[0, 0], green[0, 0], blue[0, 0]], 0.97, atol=0.02)
    assert plots.saliency(make_images(1), {"model": gradients}).axes[0].images[0].get_cmap().name == "gray"


def test_png_holds_the_figure_at_its_size():
    figure = plots.image_rows({"original": make_images(2)})
    picture = Image.open(io.BytesIO(plots.png(figure, dpi=80)))
    assert picture.format == "PNG"
    np.testing.assert_allclose(picture.size, 80 * figure.get_size_inches(), atol=1)
    asked_by_notebooks = operator.methodcaller("_repr_png_")
    assert Image.open(io.BytesIO(asked_by_notebooks(figure))).format == "PNG"


def test_a_fresh_process_draws_without_pyplot_display_or_warning(tmp_path):
    code = """if True:
        import sys
        import numpy as np
        import rbf_jax
        assert "matplotlib" not in sys.modules
        from rbf_jax import plots
        plots.png(plots.image_rows({"a": np.zeros((1, 4, 4, 1), np.float32)}))
        assert "matplotlib.pyplot" not in sys.modules
    """
    # The font cache is built in this run, and there is no display.
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, check=True, env=env | {"MPLCONFIGDIR": str(tmp_path)}, timeout=120)


GREY = make_images(2)
ONE = {"l2": [1.0]}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plots.filters(make_filters(4, 2)), "1 or 3 channels to be drawn, got 2"),
        (lambda: plots.filters(make_filters(4, 1), columns=0), "columns must be .* got 0"),
        (lambda: plots.filters(make_filters(4, 1), order="size"), "order must be one of .* got 'size'"),
        (lambda: plots.filters(RBFFilters(jnp.ones((2, 3, 3, 1)), jnp.ones(3))), r"variances must have shape \(2,\)"),
        (lambda: plots.image_rows({}), "at least one row"),
        (lambda: plots.image_rows({"a": GREY * 255}), r"rows\['a'\] must lie in \[0, 1\]"),
        (lambda: plots.image_rows({"a": GREY[0]}), r"rows\['a'\] must have 4 dimensions"),
        (lambda: plots.image_rows({"a": GREY, "b": GREY[:1]}), r"same number of images, got \{'a': 2, 'b': 1\}"),
        (lambda: plots.image_rows({"a": make_images(2, 4)}), r"rows\['a'\] must have 1 or 3 channels .* got 4"),
        (lambda: plots.image_rows({"a": GREY}, titles={"a": ["b"]}), r"titles\['a'\] must be one for .* got 1"),
        (lambda: plots.image_rows({"a": GREY}, titles={"b": ["1", "2"]}), r"titles\['b'\] must be one for each image"),
        (lambda: plots.curves({}, "x", "y"), "at least one line, got {}"),
        (lambda: plots.curves({"l2": {}}, "x", "y"), "at least one line"),
        (lambda: plots.curves({"l2": {"a": ([1, 2], [1])}}, "x", "y"), r"panels\['l2'\]\['a'\] must be finite \(N,\)"),
        (lambda: plots.curves({"l2": {"a": ([1], [np.nan])}}, "x", "y"), r"must be finite .*\[nan\]"),
        (lambda: plots.reconstruction_distances({}, {}), "same norms"),
        (lambda: plots.reconstruction_distances(ONE, {"l1": [1.0]}), r"same norms, got \['l2'\] and \['l1'\]"),
        (lambda: plots.reconstruction_distances(ONE, {"l2": [1.0, 2.0]}), r"'l2' must be \(N,\).*\(1,\) and \(2,\)"),
        (lambda: plots.reconstruction_distances(ONE, {"l2": [np.nan]}), r"after\['l2'\] must be finite"),
        (lambda: plots.reconstruction_distances({"l2": [-1.0]}, ONE), r"before\['l2'\] must be .* got -1.0"),
        (lambda: plots.reconstruction_distances({"l2": [0.0]}, ONE), r"before\['l2'\] must hold a distance above 0"),
        (lambda: plots.saliency(GREY, {}), "at least one model"),
        (lambda: plots.saliency(GREY + 1, {"a": GREY}), r"images must lie in \[0, 1\]"),
        (lambda: plots.saliency(GREY, {"a": GREY[:1]}), r"maps\['a'\] must have the images' shape"),
        (lambda: plots.saliency(GREY, {"a": GREY / 0}), r"maps\['a'\] must be finite, got 128"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_inputs_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
