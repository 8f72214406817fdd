"""Several teachers as one: the mean of their class probabilities, their features side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastsskd.errors import InputError


class Ensemble(nn.Module):
    """Teachers behind the protocol of one.

    Classes are those that all members have, by name; a member without named classes gives features only.

    Args:
        members: teachers that are modules.
        names: what to call each in an error.
        multi_label: logits become probabilities by a sigmoid rather than by a softmax over the common classes.

    Raises:
        InputError: members that name classes have none in common.
    """

    score_kind = "probs"

    def __init__(self, members: Sequence[nn.Module], names: Sequence[str], multi_label: bool):
        super().__init__()
        self.members, self.multi_label = nn.ModuleList(members), multi_label
        self.embed_dim = sum(member.embed_dim for member in members)
        named = [(member.classes, name) for member, name in zip(members, names, strict=True) if member.classes]
        first, first_name = named[0] if named else ((), "")
        common = set(first).intersection(*(classes for classes, _ in named))
        self.classes = tuple(name for name in first if name in common)
        if named and not common:
            other, other_name = named[-1]
            raise InputError(
                f"teachers: no class has the same name in all of them, such as {first[0]!r} ({first_name}) and "
                f"{other[0]!r} ({other_name}); distill.teacher_classes may name them alike"
            )
        columns = [[classes.index(name) for name in self.classes] for classes, _ in named]
        # A buffer goes to the device with the module; a list would be copied there, and waited for, at every step.
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, S)`` waveform at 16 kHz -> probabilities ``(B, C)`` and clip features ``(B, sum of D)``, float32."""
        answers = [(member, *member(waveform)) for member in self.members]
        features = torch.cat([clip for _, _, clip in answers], dim=1)
        if not self.classes:
            return features.new_zeros(len(features), 0), features
        named = [(member.score_kind, scores) for member, scores, _ in answers if member.classes]
        probs = [
            probabilities(scores[:, columns], kind, self.multi_label)
            for (kind, scores), columns in zip(named, self.columns, strict=True)
        ]
        return torch.stack(probs).mean(dim=0), features


def probabilities(scores: Tensor, score_kind: str, multi_label: bool) -> Tensor:
    """A teacher's scores ``(B, C)`` as what a student can fit: per class, or a distribution over the classes."""
    if score_kind == "logits":
        return scores.sigmoid() if multi_label else scores.softmax(dim=-1)
    if multi_label:
        return scores
    # Per-class probabilities of a multi-label teacher, as the distribution a softmax student can fit.
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-8)
