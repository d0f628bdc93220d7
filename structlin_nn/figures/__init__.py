"""Figures from records and tables, with the common style of :mod:`structlin_nn.figures.style`."""
