"""The confusion matrix against scikit-learn's, and its picture."""

import matplotlib.image
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_s

from fastsskd.errors import InputError
from fastsskd.evaluation.confusion import MAX_DRAWN, confusion_matrix, draw, most_confused


def case(n, c, seed=0):
    random = np.random.default_rng(seed)
    return random.random((n, c)), random.integers(0, c, n)


@pytest.mark.parametrize(("n", "c"), [(1, 2), (50, 3), (200, 12)])
def test_counts_are_scikit_learns(n, c):
    probs, labels = case(n, c)
    assert (confusion_matrix(probs, labels) == sklearn_s(labels, probs.argmax(axis=1), labels=range(c))).all()


def test_the_pairs_most_often_confused_by_hand():
    matrix = np.array([[5, 3, 0], [1, 9, 0], [0, 4, 4]])
    assert most_confused(matrix, ("a", "b", "c"), most=2) == [
        {"true": "c", "taken_for": "b", "clips": 4, "share": 0.5},
        {"true": "a", "taken_for": "b", "clips": 3, "share": 0.375},
    ]
    assert len(most_confused(matrix, ("a", "b", "c"))) == 3
    assert most_confused(np.diag([3, 0]), ("a", "b")) == []


@pytest.mark.parametrize("c", [2, 10, 50, MAX_DRAWN + 1])
def test_a_row_s_colours_are_its_shares(tmp_path, c):
    """The cell of the only true class is dark, all others are white."""
    matrix = np.zeros((c, c), np.int64)
    matrix[1, 0] = 7
    draw(matrix, [f"class {i}" for i in range(c)], tmp_path / "new/c.png")
    picture = matplotlib.image.imread(tmp_path / "new/c.png")[..., :3]
    dark = (picture[..., 2] > 0.3) & (picture[..., 0] < 0.1)  # the darkest blue: one cell, and the top of the scale
    assert 50 < dark.sum() < dark.size / 3
    assert min(picture.shape[:2]) > 400


def test_a_name_that_is_no_picture_s_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"c.docx: cannot be written.*name a .png") as caught:
        draw(np.eye(2, dtype=np.int64), ("a", "b"), tmp_path / "c.docx")
    assert "\n" not in str(caught.value)
