"""The front page's figure is of the results as they are."""

import xml.etree.ElementTree as ElementTree

from benchmarks import figures


def test_the_figure_is_of_the_files_as_they_are(tmp_path):
    drawn = figures.series(figures.load())
    said = "run python -m benchmarks.figures"
    assert figures.digest_of(figures.FIGURE) == figures.digest(drawn), said
    path = tmp_path / "figure.svg"
    figures.draw(drawn, path)
    ElementTree.parse(path)
    assert figures.digest_of(path) == figures.digest(drawn)
    drawn["quality"]["LASER"][0][1] += 1e-6
    assert figures.digest_of(figures.FIGURE) != figures.digest(drawn)


def test_what_is_drawn():
    drawn = figures.series(figures.load())
    lengths = [x for x, _ in drawn["attention"]["full attention"]]
    assert lengths == [256, 512, 1024, 2048, 4096, 8192]
    assert all([x for x, _ in line] == lengths for line in drawn["attention"].values())
    # A figure that docs/results.md and docs/lrea.md state too.
    full, sparse = (
        dict(drawn["attention"][name])[8192] for name in ("full attention", "Sparsity-2")
    )
    assert round(full / sparse) == 96
    din, ours = (
        dict(drawn["serving"][name])[10_000] for name in ("DIN on the whole history", "LREA, r=128")
    )
    assert round(din / ours, 1) == 75.5
    assert [round(auc, 4) for _, auc in drawn["quality"]["SparseCTR"]] == [0.8073, 0.8033, 0.8069]
