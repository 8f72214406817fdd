"""Files of per-clip probabilities: what goes in comes out, and anything else is named in one line."""

import numpy as np
import pytest

from fastsskd.errors import InputError
from fastsskd.evaluation.score_file import ClipScores, load, pooled, save


def scores(keys, classes=("a", "b"), multi_label=False):
    probs = np.random.default_rng(len(keys)).random((len(keys), len(classes))).astype(np.float32)
    label = np.arange(len(keys)) % len(classes)
    label = np.eye(len(classes), dtype=np.float32)[label] if multi_label else label
    return ClipScores(np.array(keys, str), label, probs, tuple(classes))


@pytest.mark.parametrize("multi_label", [False, True])
def test_what_is_saved_is_read_by_numpy_alone(tmp_path, multi_label):
    given = scores(["x/1.wav", "ÿ 2.wav", "3"], multi_label=multi_label)
    save(tmp_path / "new/s.npz", given)
    with np.load(tmp_path / "new/s.npz", allow_pickle=False) as file:
        assert file["key"].tolist() == ["x/1.wav", "ÿ 2.wav", "3"] and file["classes"].tolist() == ["a", "b"]
        assert (file["probs"] == given.probs).all() and (file["label"] == given.label).all()
    found = load(tmp_path / "new/s.npz")
    assert found.classes == ("a", "b") and (found.probs == given.probs).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.npz"]


def test_pooling_puts_the_clips_after_each_other():
    parts = [scores(["1", "2"]), scores(["3"])]
    whole = pooled(parts)
    assert whole.key.tolist() == ["1", "2", "3"]
    assert (whole.probs == np.concatenate([part.probs for part in parts])).all()
    with pytest.raises(InputError, match="clip 2 is in two"):
        pooled([scores(["1", "2"]), scores(["2"])])
    with pytest.raises(InputError, match="different classes"):
        pooled([scores(["1", "2"]), scores(["3"], classes=("b", "a"))])


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("key")
    np.savez(tmp_path / "other.npz", key=np.zeros(3))
    np.savez(tmp_path / "uneven.npz", key=["a"], label=[0], probs=np.zeros((2, 2)), classes=["a", "b"])
    save(tmp_path / "cut.npz", scores(["1", "2"]))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:200])
    for name in ("text", "other", "uneven", "cut"):
        with pytest.raises(InputError, match=f"{name}.npz") as caught:
            load(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)
