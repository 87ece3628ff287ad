"""Figures, drawn for real."""


def drawn(figure):
    figure.savefig("/dev/null", format="png")
    return figure.axes
