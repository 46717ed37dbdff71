import pytest
from matplotlib.figure import Figure


@pytest.fixture
def saved_figures(monkeypatch):
    """The figures that are saved while a test runs, in that order."""
    figures = []
    save = Figure.savefig

    def save_and_keep(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", save_and_keep)
    return figures
