"""fastsskd: audio self-supervision and distillation (ACM-SSKD) around a loader that never makes a GPU wait."""

__version__ = "0.1.0"
