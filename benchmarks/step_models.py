"""Students and teachers of the published sizes with random weights, on which no second and no byte depends."""

from pathlib import Path

import torch
from timm.models.vision_transformer import Block

from fastsskd.answers.stored import StoredAnswers
from fastsskd.config import AugmentConfig, DataConfig, DistillConfig
from fastsskd.distill import Distill
from fastsskd.model import build_model
from fastsskd.teachers import Teacher
from fastsskd.teachers.beats import BeatsTeacher
from fastsskd.teachers.beats_model import Beats, BeatsConfig
from fastsskd_kernels import num_frames

CLASSES = tuple(f"sound {number}" for number in range(527))
SECONDS = 10.0


def save_ast(folder: Path, depth: int = 12, width: int = 768) -> dict[str, str]:
    """A checkpoint in AST's original layout, and the list of its classes; the two options that name them."""
    torch.manual_seed(0)
    draw = {"cls_token": (1, 1, width), "dist_token": (1, 1, width), "pos_embed": (1, 1214, width)}
    draw |= {"patch_embed.proj.weight": (width, 1, 16, 16), "patch_embed.proj.bias": (width,)}
    weights = {f"v.{name}": 0.05 * torch.randn(shape) for name, shape in draw.items()}
    for i in range(depth):
        block = Block(width, width // 64, qkv_bias=True)
        weights |= {f"v.blocks.{i}.{name}": value for name, value in block.state_dict().items()}
    for name in ("v.norm", "mlp_head.0"):
        weights |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    weights |= {"mlp_head.1.weight": 0.1 * torch.randn(527, width), "mlp_head.1.bias": -3.0 + torch.randn(527)}
    torch.save({f"module.{name}": value for name, value in weights.items()}, folder / "audioset_10_10.pth")
    rows = "".join(f"{number},/m/{number},{name}\n" for number, name in enumerate(CLASSES))
    (folder / "classes.csv").write_text(f"index,mid,display_name\n{rows}", encoding="utf-8")
    return {"path": str(folder / "audioset_10_10.pth"), "classes": str(folder / "classes.csv")}


def beats(depth: int = 12) -> BeatsTeacher:
    """BEATs iter3+, fine-tuned: 90 M parameters, 496 patches of a 10 s clip."""
    torch.manual_seed(0)
    config = BeatsConfig(
        input_patch_size=16,
        encoder_layers=depth,
        deep_norm=True,
        relative_position_embedding=True,
        num_buckets=320,
        max_distance=800,
        gru_rel_pos=True,
        finetuned_model=True,
        predictor_class=len(CLASSES),
    )
    return BeatsTeacher(Beats(config), config, CLASSES)


def student(size: str, teacher: Teacher | StoredAnswers | None) -> Distill:
    model = build_model(size, len(CLASSES), seconds=SECONDS)
    torch.manual_seed(0)  # the map that joins features of two widths is the same in all
    return Distill(
        model,
        classes=CLASSES,
        multi_label=True,
        distill=DistillConfig(),
        augmentation=AugmentConfig(),
        data=DataConfig(),
        num_frames=num_frames(round(SECONDS * 16_000)),
        teacher=teacher,
    )
