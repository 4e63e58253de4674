"""Figures as PNG files that are small enough to be committed."""

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

COLOURS = 256  # more than a chart of lines has, shades of its letters' edges included


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure with a palette of its colours: about a third of the bytes of full colour."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB")
    method = Image.Quantize.MAXCOVERAGE  # keeps the ends of colour bars
    image.quantize(COLOURS, method, kmeans=2).save(path, optimize=True)
