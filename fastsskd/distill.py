"""Supervised learning with knowledge distillation (Section 3.4): Batch -> (loss, metrics)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsskd import losses
from fastsskd.answers.stored import StoredAnswers
from fastsskd.augment import augment, mix_fbank, mixup_partner
from fastsskd.batch import Batch
from fastsskd.class_map import teacher_columns
from fastsskd.config import AugmentConfig, DataConfig, DistillConfig
from fastsskd.errors import UsageError
from fastsskd.model import ACM
from fastsskd.stochastic_depth import draw_depth
from fastsskd.teachers import Teacher, ask


class Distill(nn.Module):
    """One step of ``L = CE(student, labels) + CE(student, teacher) + gamma MSE(student, teacher)`` (Formulas 11-13).

    Args:
        model: the student; its decoder and MAE module take no part. With ``distill.frozen`` its head alone is trained,
            and the pooling of that if it is attentive: a linear probe.
        classes: of the data set, in label order.
        multi_label: binary cross entropy per class instead of softmax.
        distill, augmentation, data: sections of the configuration.
        num_frames: frames of the input that are not padding.
        teacher: frozen, or None for plain supervised training (Table 8, "None"). It is kept outside the module tree,
            so that it has no optimizer state, no gradients and no place in the checkpoint. If its answers are stored,
            they come with the batches.
        class_map: the teacher's name of a class where it is another one; see ``class_map.py``. A teacher that lacks one
            of the classes gives features only.
    """

    def __init__(
        self,
        model: ACM,
        *,
        classes: tuple[str, ...],
        multi_label: bool,
        distill: DistillConfig,
        augmentation: AugmentConfig,
        data: DataConfig,
        num_frames: int,
        teacher: Teacher | StoredAnswers | None = None,
        class_map: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.model, self.num_classes, self.multi_label = model, len(classes), multi_label
        self.distill, self.augmentation, self.data, self.num_frames = distill, augmentation, data, num_frames
        for name, parameter in model.named_parameters():
            if distill.frozen:
                parameter.requires_grad_(name.startswith(("head.", "pool.")))
            else:
                parameter.requires_grad_(not name.startswith(("mae.", "decoder.")))
        self._outside = (teacher,)
        columns = None if teacher is None else teacher_columns(classes, teacher.classes, class_map or {})
        self.uses_scores = columns is not None and distill.teacher_labels
        # A buffer goes to the device with the module; a list would be copied there, and waited for, at every step.
        self.register_buffer("columns", None if columns is None else torch.tensor(columns), persistent=False)
        if not (distill.labels or self.uses_scores or (teacher is not None and distill.gamma > 0)):
            raise UsageError(
                "[distill] leaves no loss: labels are off and the teacher gives neither scores nor features"
            )
        same_width = teacher is None or teacher.embed_dim == model.embed_dim
        self.projection = None if same_width else nn.Linear(model.embed_dim, teacher.embed_dim)

    @property
    def teacher(self) -> Teacher | StoredAnswers | None:
        return self._outside[0]

    @property
    def asks(self) -> bool:
        """Whether there is a teacher that hears the clips in the step."""
        return self.teacher is not None and not isinstance(self.teacher, StoredAnswers)

    def ask_ahead(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step with the teacher's answers, asked once for all of them.

        A small micro-batch that the student's activations force leaves a card idle under the teacher, which keeps none.
        """
        if not self.asks or len(batches) < 2:
            return batches
        counts = [len(batch) for batch in batches]
        answers = self.teach(torch.cat([batch.waveform for batch in batches]))
        rows = zip(batches, *(answer.split(counts) for answer in answers), strict=True)
        return [replace(b, waveform=None, teacher_probs=probs, teacher_features=own) for b, probs, own in rows]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, and its parts, detached.

        With a teacher the batch carries the waveforms, or the answers: stored ones, or :meth:`ask_ahead`'s.
        """
        fbank, target = batch.fbank, self._targets(batch.label)
        scores = features = None
        if batch.teacher_features is not None and self.teacher is not None:
            scores, features = batch.teacher_probs, batch.teacher_features
        elif self.asks:
            scores, features = self.teach(batch.waveform)
        if self.augmentation.mixup > 0 and len(batch) > 1:
            partner, ratio = mixup_partner(batch.seed, self.augmentation)
            fbank = mix_fbank(fbank, partner, ratio, self.data.std)
            # The teacher heard the clips one by one; its answers are mixed as the labels are.
            target, scores, features = (_mix(x, partner, ratio) for x in (target, scores, features))
        draw_depth(self.model, batch.seed)
        fbank = augment(fbank, batch.seed, self.augmentation, self.num_frames)
        logits, clip = self.model(fbank, frozen=self.distill.frozen)
        terms = {}
        if self.distill.labels:
            terms["label"] = losses.label_cross_entropy(logits, self._smooth(target), self.multi_label)
        if scores is not None and self.uses_scores:
            terms["teacher_label"] = losses.label_cross_entropy(logits, scores, self.multi_label)
        total = sum(terms.values())
        if features is not None and self.distill.gamma > 0:
            clip = clip if self.projection is None else self.projection(clip)
            terms["regression"] = losses.regression(clip, features)
            total = total + self.distill.gamma * terms["regression"]
        metrics = {name: value.detach() for name, value in terms.items()}
        return total, metrics

    def _targets(self, label: Tensor) -> Tensor:
        """``(B, C)`` probabilities of the labels."""
        return label.float() if self.multi_label else F.one_hot(label, self.num_classes).float()

    def _smooth(self, target: Tensor) -> Tensor:
        share = self.distill.label_smoothing
        floor = 0.5 if self.multi_label else 1.0 / self.num_classes
        return target * (1.0 - share) + share * floor if share else target

    def teach(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's class probabilities and clip features; in a 16-bit run it multiplies in 16 bits too."""
        return ask(self.teacher, waveform, self.columns, self.multi_label, self.model.patch_embed.weight.dtype)


def _mix(values: Tensor | None, partner: Tensor, ratio: Tensor) -> Tensor | None:
    """``ratio * values + (1 - ratio) * values[partner]``, row by row."""
    if values is None:
        return None
    ratio = ratio.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
    return ratio * values + (1.0 - ratio) * values[partner]
