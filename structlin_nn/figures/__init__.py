"""Figures, from records and tables alone: :mod:`structlin_nn.figures.style` says how all of them look."""
