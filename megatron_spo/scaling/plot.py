"""Draws a fit in two panels: observed over predicted, and residuals over the size used to test extrapolation."""

import matplotlib
import numpy as np
from matplotlib.ticker import LogFormatter

from megatron_spo.report import figures
from megatron_spo.scaling.fit import Fit


def draw(fit: Fit, extension: str) -> bytes:
    """Returns the content of a file with an extension of figures.IMAGES. Runs that never crossed the bound (law
    stability) have hollow markers."""
    law, points, values = fit.law, fit.points, fit.values
    seen = points[law.outcome]
    predicted, left = law.predict(values, points), law.residuals(values, points)
    hollow = points["crossed"] == 0 if "crossed" in points else np.zeros(len(seen), dtype=bool)
    blue, grey = figures.PALETTE[0], figures.PALETTE[7]
    with matplotlib.rc_context(figures.STYLE):
        figure, (fits, residuals) = figures.new_figure(2)
        for axes, x, y in ((fits, predicted, seen), (residuals, law.size(points), left)):
            axes.scatter(x[~hollow], y[~hollow], s=14, color=blue)
            axes.scatter(x[hollow], y[hollow], s=14, edgecolors=blue, facecolors="none")
            axes.grid(alpha=0.2)
        ends = [min(predicted.min(), seen.min()), max(predicted.max(), seen.max())]
        fits.plot(ends, ends, color=grey, linewidth=1)
        if ends[0] > 0:
            fits.set(xscale="log", yscale="log")
            for axis in (fits.xaxis, fits.yaxis):  # "30" instead of the much wider "3 x 10^1"
                axis.set_major_formatter(LogFormatter())
                axis.set_minor_formatter(LogFormatter())
        fits.set(title=law.name, xlabel=f"{law.outcome}, predicted", ylabel=f"{law.outcome}, observed")
        residuals.axhline(0, color=grey, linewidth=1)
        if law.size(points).min() > 0:
            residuals.set(xscale="log")
        residuals.set(title="Residuals", xlabel=law.size_name, ylabel=law.unit)
        return figures.file_image(figure, extension)
