"""Figures 2, 3 and 5 of the paper, and rows of images. The only module that imports matplotlib.

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
    what = f"{count} RBF filter{'s' if count > 1 else ''} of {height} × {width}"
    span = "dark to bright" if order == "brightness" else "narrow to wide"
    title = f"{what}, {span}" + (", σ beneath" if captions else "")
    figure.text(0.5, 1 - title_height / 2 / figure_height, title, ha="center", va="center", fontsize=10)
    return figure


def image_rows(rows: Mapping[str, ArrayLike], *, titles: Sequence[str] | None = None) -> Figure:
    """Labelled rows of images: originals, attacked, and the reconstructions of both, one column for each image.

    Args:
        rows: label -> float32 images ``(N, H, W, C)`` in [0, 1], C 1 or 3, the same N in all. Black is 0 and white 1 in
            every image.
        titles: N titles of the columns.

    Returns:
        A figure with one axes for each image, row by row.

    Raises:
        ValueError: no rows, images out of range, or numbers of images and titles that do not agree.
    """
    if not rows:
        raise ValueError(f"rows must hold at least one row of images, got {rows!r}")
    pictures = [(label, _pictures(f"rows[{label!r}]", images)) for label, images in rows.items()]
    counts = {label: len(images) for label, images in pictures}
    if len(set(counts.values())) > 1:
        raise ValueError(f"all rows must have the same number of images, got {counts}")
    if titles is not None and len(titles) != next(iter(counts.values())):
        raise ValueError(f"titles must be one for each column, got {len(titles)} for rows of {counts}")
    return _draw_rows(pictures, titles, "gray")


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
        axes.locator_params(nbins=5)
        axes.tick_params(labelsize=9)
        axes.set_xlabel(f"{name} distance of the inputs", fontsize=10)
        axes.set_ylabel(f"{name} distance of the reconstructions", fontsize=10)
        ratio, above = np.median(y[some] / x[some]), np.mean(y[some] > x[some])
        axes.set_title(f"{name}: median ratio {ratio:.2f} (N = {number})\n{above:.1%} above the diagonal", fontsize=10)
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
        if not jnp.isfinite(gradients).all():
            raise ValueError(
                f"maps[{label!r}] must be finite, got {jnp.sum(~jnp.isfinite(gradients))} values that are not"
            )
        rows.append((label, as_picture(gradients, _CLIP)))
    note = f"Each map is scaled to ±{_CLIP:g} of its own standard deviations. "
    if first.shape[-1] == 1:
        note += "Red: a brighter pixel raises the loss; blue: lowers it."
    else:
        note += "Each channel by itself; mid-grey: no gradient."
    return _draw_rows(rows, None, "RdBu_r", note)


def _draw_rows(rows: Sequence[tuple[str, Array]], titles: Sequence[str] | None, cmap: str, note: str = "") -> Figure:
    """A grid of pictures, labels at the left; the colour map is that of all rows but the first, which is grey."""
    columns = len(rows[0][1])
    cell = min(1.0, max(0.5, 11 / columns))
    labels = [textwrap.fill(label, 20) for label, _ in rows]
    margin = 0.2 + _INCHES_PER_CHARACTER * max(len(line) for label in labels for line in label.split("\n"))
    titles = None if titles is None else [_wrap(title, cell, 9) for title in titles]
    above = 0.0 if titles is None else 0.16 * max(title.count("\n") + 1 for title in titles)
    width = max(margin + columns * (cell + 0.04), 3.0 if note else 0.0)
    note = _wrap(note, width, 8)
    below = 0.16 * (note.count("\n") + 1) if note else 0.0

    ratio = max(images.shape[1] / images.shape[2] for _, images in rows)
    figure = _Figure((width, len(rows) * (ratio * cell + 0.04) + above + below + 0.1), layout="compressed")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(np.asarray(images)):
            _show(panels[row, column], image, cmap if row else "gray")
        panels[row, 0].set_ylabel(labels[row], rotation=0, ha="right", va="center", fontsize=10, labelpad=6)
    for axes, title in zip(panels[0], titles or [], strict=False):
        axes.set_title(title, fontsize=9, pad=3)
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
