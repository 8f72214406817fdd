"""Multi-SSL (Section 3.2 and 3.3): Batch -> (loss, metrics)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastsskd import health, losses
from fastsskd.batch import Batch
from fastsskd.config import LossConfig, MaskConfig
from fastsskd.model import ACM
from fastsskd.patches import patchify
from fastsskd.views import Views, make_views


class Pretrain(nn.Module):
    """One step of multi-dimensional self-supervision.

    Args:
        model: the model; its class head, and the pooling of that, take no part.
        loss, mask: the [loss] and [mask] sections of the configuration.
        slots: clips per rank in a full batch, see :func:`fastsskd.losses.gather_keys`.
        vary: what becomes of a batch before its views are made, see :func:`fastsskd.augment.vary`.

    Attributes:
        pooled: ``(B, D)`` AVG-pooled raw features of the last step, for :func:`fastsskd.health.of_features`.
    """

    def __init__(
        self,
        model: ACM,
        loss: LossConfig,
        mask: MaskConfig,
        slots: int | None = None,
        vary: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        super().__init__()
        self.model, self.loss, self.mask, self.slots, self.vary = model, loss, mask, slots, vary
        self.pooled: Tensor | None = None
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for part in (model.head, model.pool):
            if part is not None:
                part.requires_grad_(False)

    @property
    def looks_ahead(self) -> bool:
        """Whether the micro-batches of a step must know of each other: the contrast's keys are the whole step's.

        Not if the raw view has a gradient: that of one micro-batch ends before the next one's begins.
        """
        return self.loss.contrasts and not self.loss.raw_gradient

    @torch.no_grad()
    def look_ahead(self, batches: Sequence[Batch]) -> list[Batch]:
        """A step's micro-batches with their raw features and the keys of all of them.

        So a step is the same however many micro-batches it is cut into. It costs memory for the raw features of the
        step, and no time: they are not worked out again.
        """
        batches = [self.vary(batch) for batch in batches]
        raw = [self._raw(patchify(batch.fbank)) for batch in batches]
        keys = losses.gather_keys([own.mean(dim=1) for own in raw], self.slots)
        return [replace(b, raw_features=own, keys=k) for b, own, k in zip(batches, raw, keys, strict=True)]

    def forward(self, batch: Batch | Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]] | list[Batch]:
        """Formula 10 on one batch; of several, :meth:`look_ahead`, since ZeRO-3 has the weights in a forward only.

        Returns:
            The total loss, and the detached value of each term that is on, plus the step's health:
            ``feature_std``, the mean standard deviation over this rank's clips of the pooled raw features' dimensions,
            0 when all clips look alike; for each contrast ``contrast_accuracy_*``, with ``contrast_chance``; for each
            reconstruction ``variance_*`` and ``positions_*``, see :func:`fastsskd.health.restore_baselines`.
        """
        if not isinstance(batch, Batch):
            return self.look_ahead(batch)
        terms, seen = self.terms(batch)
        total = sum(self.weight(name) * value for name, value in terms.items())
        return total, {**{name: value.detach() for name, value in terms.items()}, **seen}

    def weight(self, term: str) -> float:
        """Of a term in Formula 10, such as ``"restore_intra"``."""
        loss = self.loss
        return {"restore": loss.alpha * loss.restore_scale, "mse": loss.alpha, "kl": loss.beta, "contrast": 1.0}[
            term.split("_")[0]
        ]

    def terms(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms that are switched on, without their weights and with their graphs; and the step's health."""
        if batch.keys is None:  # not looked at yet
            batch = self.vary(batch)
        views = make_views(batch, self.mask)
        raw, intra, inter = self._features(views, batch.raw_features)
        terms, seen = self._terms(views, raw, intra, inter, batch.keys)
        self.pooled = raw.detach().float().mean(dim=1)
        return terms, {"feature_std": self.pooled.std(dim=0, unbiased=False).mean(), **seen}

    def _raw(self, patches: Tensor) -> Tensor:
        """``(B, N, D)`` features of the raw view."""
        return self.model.features(patches.to(self.model.patch_embed.weight.dtype))

    def _features(self, views: Views, raw: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the three views, ``(B, N, D)`` each, the raw one's without clones: it is a target and needs no
        graph."""
        model = self.model
        dtype = model.patch_embed.weight.dtype
        raw_patches = views.raw.to(dtype)
        if raw is None:
            with contextlib.nullcontext() if self.loss.raw_gradient else torch.no_grad():
                raw = self._raw(raw_patches[: len(raw_patches) // self.mask.clones])
        tokens_intra = model.embed(views.intra.to(dtype))
        tokens_inter = model.mae(model.embed(raw_patches), model.pos_embed, views.ids_keep)
        # One pass for both: the same numbers from half as many, larger, matrix products.
        intra, inter = model.aft(torch.cat([tokens_intra, tokens_inter])).chunk(2)
        return raw, intra, inter

    def _terms(
        self, views: Views, raw: Tensor, intra: Tensor, inter: Tensor, keys: losses.Keys | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of Formula 10 that are switched on, and the health of their views."""
        loss, clips = self.loss, len(raw)
        terms, seen = {}, {}
        if keys is None and loss.contrasts:
            keys = losses.gather_keys([raw.mean(dim=1)], self.slots)[0]
        raw = raw.repeat(self.mask.clones, 1, 1) if self.mask.clones > 1 else raw
        target = views.raw
        if loss.restore_target == "res_raw":
            with contextlib.nullcontext() if loss.raw_gradient else torch.no_grad():
                target = self.model.decode(raw)
        weight = views.weight if loss.hog_weight else None
        masks = {"intra": views.intra_mask, "inter": views.inter_mask.unsqueeze(-1).expand_as(views.intra_mask)}
        for name, features in (("intra", intra), ("inter", inter)):
            if getattr(loss, f"restore_{name}"):
                mask = masks[name] if loss.restore_on == "masked" else None
                terms[f"restore_{name}"] = losses.restore(self.model.decode(features), target, weight, mask)
                seen |= self._baselines(seen, name, target.detach(), weight, mask)
            if getattr(loss, f"mse_{name}"):
                terms[f"mse_{name}"] = losses.feature_mse(features, raw)
            if getattr(loss, f"kl_{name}"):
                terms[f"kl_{name}"] = losses.feature_kl(features, raw)
            if getattr(loss, f"contrast_{name}"):
                logits, own = losses.contrast_logits(features.mean(dim=1), keys, loss.tau, clips)
                terms[f"contrast_{name}"] = losses.info_nce(logits, own)
                seen[f"contrast_accuracy_{name}"] = health.contrast_accuracy(logits.detach(), own)
                seen["contrast_chance"] = health.contrast_chance(logits.detach())
        return terms, seen

    def _baselines(
        self, seen: dict[str, Tensor], view: str, target: Tensor, weight: Tensor | None, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """``variance_*`` and ``positions_*`` of a view; over all pixels they are those of the other one."""
        if mask is None and "variance_intra" in seen:
            variance, positions = seen["variance_intra"], seen["positions_intra"]
        else:
            variance, positions = health.restore_baselines(target, self.model.grid_size, weight, mask)
        return {f"variance_{view}": variance, f"positions_{view}": positions}
