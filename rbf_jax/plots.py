"""Figures 2 to 6 of the paper, and curves. The only module of the package that imports matplotlib.

Every function returns a new `matplotlib.figure.Figure`, made without pyplot: nothing global is touched and no display
is needed. A notebook shows the figure that a cell returns; `png` gives its bytes for a file or a report.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Figure
from numpy.typing import ArrayLike

from rbf_jax.checks import check_choice, check_count, check_images
from rbf_jax.rbf import RBFFilters, check_filters
from rbf_jax.saliency import as_picture
from rbf_jax.types import Array

ORDERS = ("brightness", "variance")
_NORMS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}
_MOST_CAPTIONS = 64
_CLIP = 3.0
_INCHES_PER_CHARACTER = 0.08
_FRAME = "0.6"
# Colours that stay apart for the colour-blind (Okabe and Ito; wine, olive, grey), markers, dashes: 20 different looks.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#882255",
    "#999933",
    "#888888",
)
_MARKERS, _DASHES = "os^DvPX<>p", ("-", "--", "-.", ":")


class _Figure(Figure):
    def _repr_png_(self) -> bytes:
        # IPython itself knows how to show a Figure only after pyplot was imported.
        return png(self, dpi=100)


def png(figure: Figure, dpi: float = 150) -> bytes:
    """The figure as the bytes of a PNG file, ``dpi`` pixels to the inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def filters(filters: RBFFilters, *, columns: int | None = None, order: str = "brightness") -> Figure:
    """The means of the filters as a grid of tiny images, grey or in colour.

    Up to 64 filters carry their sigma beneath, the root of the total variance (Eq. 3), in units of intensity.

    Args:
        filters: K filters, of 1 or 3 channels.
        columns: filters in a row; None takes 8 for up to 64 filters, else 20.
        order: ``"brightness"``, from dark to bright, or ``"variance"``, from narrow to wide.

    Returns:
        A figure with K axes, row by row in that order.

    Raises:
        ValueError: bad filters, channels other than 1 and 3, an unknown order, or columns below 1.

    Reference: Fig. 2.
    """
    check_filters(filters)
    _check_channels("filters", filters.means.shape)
    check_choice(order, "order", ORDERS)
    if columns is not None:
        check_count(columns, "columns")
    means, variances = np.asarray(filters.means), np.asarray(filters.variances)
    count, height, width, _ = means.shape
    captions = count <= _MOST_CAPTIONS
    in_row = min(count, columns or (8 if captions else 20))
    rows = math.ceil(count / in_row)
    ranks = np.argsort(means.mean((1, 2, 3)) if order == "brightness" else variances, kind="stable")

    # Placed by hand, in inches: a layout engine takes seconds over hundreds of axes.
    side = 0.66 if captions else 0.37
    tall = side * height / width
    step, step_down, title_height = side + 0.08, tall + (0.28 if captions else 0.08), 0.4
    figure_width, figure_height = max(in_row * step + 0.08, 4.5), rows * step_down + title_height
    left = (figure_width - in_row * step + step - side) / 2
    figure = _Figure((figure_width, figure_height))
    for place, j in enumerate(ranks):
        row, column = divmod(place, in_row)
        x, y = left + column * step, figure_height - title_height - row * step_down - tall
        axes = figure.add_axes((x / figure_width, y / figure_height, side / figure_width, tall / figure_height))
        _show(axes, means[j])
        if captions:
            axes.set_xlabel(f"{math.sqrt(variances[j]):.2g}", fontsize=8, labelpad=2)
    span = ("dark to bright" if order == "brightness" else "narrow to wide") + (", σ beneath" if captions else "")
    title = f"{count} RBF filter{'s' if count > 1 else ''} of {height} × {width}, {span}"
    figure.text(0.5, 1 - title_height / 2 / figure_height, title, ha="center", va="center", fontsize=10)
    return figure


def image_rows(rows: Mapping[str, ArrayLike], *, titles: Mapping[str, Sequence[str]] | None = None) -> Figure:
    """Labelled rows of images: originals, attacked, and the reconstructions of both, one column for each image.

    Args:
        rows: label -> float32 images ``(N, H, W, C)`` in [0, 1], C 1 or 3, the same N in all. Black is 0 and white 1 in
            every image.
        titles: label of a row -> N titles above its images; rows may be left out.

    Returns:
        A figure with one axes for each image, row by row.

    Raises:
        ValueError: no rows, images out of range, titles of no row, or numbers of images and titles that do not agree.

    Reference: Figs. 4 and 6.
    """
    if not rows:
        raise ValueError(f"rows must hold at least one row of images, got {rows!r}")
    pictures = [(label, _pictures(f"rows[{label!r}]", images)) for label, images in rows.items()]
    counts = {label: len(images) for label, images in pictures}
    if len(set(counts.values())) > 1:
        raise ValueError(f"all rows must have the same number of images, got {counts}")
    for label, line in (titles or {}).items():
        if len(line) != counts.get(label):
            raise ValueError(f"titles[{label!r}] must be one for each image of rows of {counts}, got {len(line)}")
    return _draw_rows(pictures, titles or {}, "gray")


def reconstruction_distances(before: Mapping[str, ArrayLike], after: Mapping[str, ArrayLike]) -> Figure:
    """Distance of two images against the distance of their reconstructions, one panel for each norm.

    A point below the diagonal is a pair that the front end brought closer. Titles give the median of after / before and
    the share of pairs above the diagonal, where the front end did not contract. Pairs of equal inputs (distance 0) have
    no ratio and count in neither.

    Args:
        before: norm (``"linf"``, ``"l2"``, ``"l1"``, or another label) -> ``(N,)`` distances of the inputs, at least 0.
        after: the same norms -> ``(N,)`` distances of the reconstructions.

    Returns:
        A figure with one axes for each norm, in the order of ``before``.

    Raises:
        ValueError: norms or lengths that do not agree, distances that are not finite and at least 0, or all 0.

    Reference: Fig. 3.
    """
    if not before or set(before) != set(after):
        raise ValueError(f"before and after must have the same norms, got {list(before)} and {list(after)}")
    pairs = {norm: _distances(norm, before[norm], after[norm]) for norm in before}
    figure = _Figure((3.3 * len(pairs), 3.7), layout="constrained")
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, (norm, (x, y)) in zip(panels, pairs.items(), strict=True):
        name = _NORMS.get(norm, norm)
        some = x > 0
        number = f"{some.sum()}" if some.all() else f"{some.sum()} of {some.size}"
        # One scale on both axes: the diagonal then shows what contracts without a look at the ticks.
        limit = 1.06 * max(x.max(), y.max())
        axes.plot([0, limit], [0, limit], color="0.4", linewidth=1, linestyle="--")
        axes.scatter(x, y, s=14, alpha=0.5, linewidths=0, color="tab:blue", clip_on=False, zorder=3)
        axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
        axes.set(xlabel=f"{name} distance of the inputs", ylabel=f"{name} distance of the reconstructions")
        axes.locator_params(nbins=5)
        ratio, above = np.median(y[some] / x[some]), np.mean(y[some] > x[some])
        axes.set_title(f"{name}: median ratio {ratio:.2f} (N = {number})\n{above:.1%} above the diagonal", fontsize=10)
    return figure


def curves(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], xlabel: str, ylabel: str, *, log: bool = False
) -> Figure:
    """Lines through points, which differ in marker and dashes and not in colour alone; the same in every panel.

    Args:
        panels: title (a norm or any other) -> label -> finite x ``(N,)`` and y ``(N,)``; y is drawn from 0 on.
        xlabel: of every panel.
        ylabel: of the first.
        log: whether x has a logarithmic axis.

    Returns:
        A figure with one axes for each panel, and one legend.

    Raises:
        ValueError: no lines, or points that are not finite or differ in number.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    if not labels:
        raise ValueError(f"panels must hold at least one line, got {panels!r}")
    width = max(3.3 * len(panels), 5.0)
    in_row = max(1, int(width / (0.8 + _INCHES_PER_CHARACTER * max(map(len, labels)))))
    figure = _Figure((width, 3.2 + 0.22 * math.ceil(len(labels) / in_row)), layout="constrained")
    row, handles = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], {}
    for axes, (title, lines) in zip(row, panels.items(), strict=True):
        for label, points in lines.items():
            x, y = (np.asarray(values, np.float64) for values in points)
            if x.ndim != 1 or x.shape != y.shape or not np.isfinite([x, y]).all():
                raise ValueError(f"panels[{title!r}][{label!r}] must be finite (N,) and (N,), got {points}")
            color, marker, dash = (looks[labels.index(label) % len(looks)] for looks in (_COLOURS, _MARKERS, _DASHES))
            (handles[label],) = axes.plot(x, y, color=color, marker=marker, linestyle=dash, markersize=5, clip_on=False)
        axes.set(title=_NORMS.get(title, title), xlabel=xlabel, xscale="log" if log else "linear")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(color="0.9")
    row[0].set(ylabel=ylabel, ylim=(0, None))  # shared, and so after all lines
    figure.legend([*handles.values()], labels, loc="outside lower center", ncols=in_row, frameon=False, handlelength=3)
    return figure


def saliency(images: ArrayLike, maps: Mapping[str, ArrayLike]) -> Figure:
    """Images, and under each the loss gradients of several models, scaled by `saliency.as_picture`.

    Gradients of grey images are drawn red where a brighter pixel raises the loss and blue where it lowers it; those of
    colour images channel by channel, around a mid-grey that means none.

    Args:
        images: float32 ``(N, H, W, C)`` in [0, 1], C 1 or 3.
        maps: model -> its gradients `saliency.loss_gradients`, ``(N, H, W, C)``.

    Returns:
        A figure with one axes for each image and gradient, row by row, the images first.

    Raises:
        ValueError: images out of range, no maps, or maps that are not finite or of another shape than the images.

    Reference: Fig. 5.
    """
    first = _pictures("images", images)
    if not maps:
        raise ValueError(f"maps must hold the gradients of at least one model, got {maps!r}")
    # Pairs, for a model may well bear the name of the row of images.
    rows = [("image", first)]
    for label, values in maps.items():
        gradients = jnp.asarray(values)
        if gradients.shape != first.shape:
            raise ValueError(f"maps[{label!r}] must have the images' shape {first.shape}, got {gradients.shape}")
        wrong = jnp.sum(~jnp.isfinite(gradients))
        if wrong:
            raise ValueError(f"maps[{label!r}] must be finite, got {wrong} values that are not")
        rows.append((label, as_picture(gradients, _CLIP)))
    note = f"Each map is scaled to ±{_CLIP:g} of its own standard deviations. "
    grey = "Red: a brighter pixel raises the loss; blue: lowers it."
    note += grey if first.shape[-1] == 1 else "Each channel by itself; mid-grey: no gradient."
    return _draw_rows(rows, {}, "RdBu_r", note)


def _draw_rows(
    rows: Sequence[tuple[str, Array]], titles: Mapping[str, Sequence[str]], cmap: str, note: str = ""
) -> Figure:
    """A grid of pictures, labels at the left; the colour map is that of all rows but the first, which is grey."""
    columns = len(rows[0][1])
    cell = min(1.0, max(0.5, 11 / columns))
    labels = [textwrap.fill(label, 20) for label, _ in rows]
    margin = 0.2 + _INCHES_PER_CHARACTER * max(len(line) for label in labels for line in label.split("\n"))
    titles = {label: [_wrap(title, cell, 9) for title in line] for label, line in titles.items()}
    above = 0.16 * sum(max(title.count("\n") + 1 for title in line) for line in titles.values())
    width = max(margin + columns * (cell + 0.04), 3.0 if note else 0.0)
    note = _wrap(note, width, 8)
    below = 0.16 * (note.count("\n") + 1) if note else 0.0

    ratio = max(images.shape[1] / images.shape[2] for _, images in rows)
    figure = _Figure((width, len(rows) * (ratio * cell + 0.04) + above + below + 0.1), layout="compressed")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in enumerate(rows):
        for column, image in enumerate(np.asarray(images)):
            _show(panels[row, column], image, cmap if row else "gray")
        for axes, title in zip(panels[row], titles.get(label, []), strict=False):
            axes.set_title(title, fontsize=9, pad=3)
        panels[row, 0].set_ylabel(labels[row], rotation=0, ha="right", va="center", fontsize=10, labelpad=6)
    if note:
        figure.supxlabel(note, fontsize=8)
    return figure


def _show(axes: Axes, image: np.ndarray, cmap: str = "gray") -> None:
    picture = image[..., 0] if image.shape[-1] == 1 else image
    axes.imshow(picture, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=_FRAME, linewidth=0.6)


def _wrap(text: str, inches: float, fontsize: int) -> str:
    return textwrap.fill(text, max(4, int(inches / (_INCHES_PER_CHARACTER * fontsize / 10))))


def _check_channels(name: str, shape: tuple[int, ...]) -> None:
    if shape[-1] not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels to be drawn, got {shape[-1]}")


def _pictures(name: str, images: ArrayLike) -> Array:
    pictures = jnp.asarray(images)
    check_images(pictures, name)
    _check_channels(name, pictures.shape)
    return pictures


def _distances(norm: str, before: ArrayLike, after: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ValueError(f"distances of {norm!r} must be (N,) before and after, got shapes {x.shape} and {y.shape}")
    for name, values in (("before", x), ("after", y)):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"{name}[{norm!r}] must be finite and at least 0, got {values.min()} to {values.max()}")
    if not x.any():
        raise ValueError(f"before[{norm!r}] must hold a distance above 0, got {x.size} zeros")
    return x, y
