"""How good is a model: scores of a manifest, metrics, intervals, folds, frozen features."""
