"""Which weights a labelled stage leaves behind."""

import torch

from fastsskd.config import DistillConfig
from fastsskd.selection import Selection


def state(value):
    return {"weight": torch.full((3,), float(value))}


def run(config, scores=None):
    """Epochs 1, 2, ... with weights of the epoch's number; returns the selection and the value left behind."""
    selection = Selection(config, lambda weights: {"accuracy": scores[int(weights["weight"][0]) - 1], "mAP": 0.0})
    for epoch in range(1, config.epochs + 1):
        if selection.wants(epoch):
            selection.add(epoch, state(epoch))
    return selection, selection.result(state(config.epochs))["weight"][0].item()


def test_last_epoch_by_default_and_nothing_is_gathered():
    selection, value = run(DistillConfig(epochs=6))
    assert value == 6.0 and not any(selection.wants(epoch) for epoch in range(1, 7))


def test_average_is_the_mean_of_the_last_epochs():
    selection, value = run(DistillConfig(epochs=6, select="average", average_epochs=3))
    assert value == 5.0 and selection.note["epochs"] == [4, 5, 6]


def test_average_over_more_epochs_than_there_are():
    assert run(DistillConfig(epochs=3, select="average", average_epochs=9))[1] == 2.0


def test_best_epoch_is_the_first_with_the_highest_score_and_says_so():
    selection, value = run(DistillConfig(epochs=4, select="best"), scores=[0.2, 0.7, 0.7, 0.5])
    assert value == 2.0 and selection.note == {"select": "best", "epochs": [2], "value": 0.7}


def test_a_moving_average_is_noted():
    assert run(DistillConfig(epochs=1, ema=0.99))[0].note == {"select": "last", "epochs": [], "ema": 0.99}
