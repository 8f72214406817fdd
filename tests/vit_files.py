"""Small ViTs of other projects, as files in their layouts, with random weights."""

from pathlib import Path

import numpy as np
import timm
import torch

from fastsskd.model import SIZES


def image_vit(img_size=224, num_classes: int = 10, size: str = "nano", **options):
    """A timm ViT with 16 x 16 patches, as wide and deep as a size of ours."""
    widths = SIZES[size]
    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=img_size,
        patch_size=16,
        embed_dim=widths.embed_dim,
        depth=widths.depth,
        num_heads=widths.num_heads,
        num_classes=num_classes,
        **options,
    ).eval()
    with torch.no_grad():  # away from the ones and zeros of a fresh model
        for parameter in vit.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return vit


def google_arrays(prefix: str = "", newer: bool = False, width: int = 64, depth: int = 2, heads: int = 2) -> dict:
    """What Google's .npz holds for a picture of 64 x 64: kernels are (in, out), heads an axis of their own."""
    random, each = np.random.default_rng(0), width // heads
    attention, mlp, norm = (0, 0, 1) if newer else (1, 3, 2)
    tokens = 16 if newer else 17
    shapes = {
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "pos_embedding" if newer else "Transformer/posembed_input/pos_embedding": (1, tokens, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, 10),
        "head/bias": (10,),
    }
    shapes |= {} if newer else {"cls": (1, 1, width), "pre_logits/kernel": (width, width), "pre_logits/bias": (width,)}
    for number in range(depth):
        block = f"Transformer/encoderblock_{number}"
        for name, source in (("LayerNorm_0", width), (f"LayerNorm_{norm}", width)):
            shapes |= {f"{block}/{name}/{kind}": (source,) for kind in ("scale", "bias")}
        inside = f"{block}/MultiHeadDotProductAttention_{attention}"
        for part in ("query", "key", "value"):
            shapes |= {f"{inside}/{part}/kernel": (width, heads, each), f"{inside}/{part}/bias": (heads, each)}
        shapes |= {f"{inside}/out/kernel": (heads, each, width), f"{inside}/out/bias": (width,)}
        dense = f"{block}/MlpBlock_{mlp}/Dense"
        shapes |= {f"{dense}_0/kernel": (width, 4 * width), f"{dense}_0/bias": (4 * width,)}
        shapes |= {f"{dense}_1/kernel": (4 * width, width), f"{dense}_1/bias": (width,)}
    return {prefix + name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def audiomae(path: Path, frames: int = 96, width: int = 64, depth: int = 2) -> dict[str, torch.Tensor]:
    """An AudioMAE's pre-trained file for ``frames`` frames, and its weights: the encoder's blocks are timm's."""
    vit = image_vit((frames, 128), 0, in_chans=1, class_token=True, global_pool="token")
    assert vit.embed_dim == width and len(vit.blocks) == depth
    state = vit.state_dict()
    for name in ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight"):
        state[name] = torch.randn(1, 1, 8)
    torch.save({"model": state, "epoch": 31, "optimizer": {"state": {}}}, path)
    return state


def accounted(report, model, in_the_file):
    """Every name in the file and in the model is in the report, and once."""
    of_model = report.names("loaded") + report.names("resized") + report.names("missing")
    assert sorted(of_model) == sorted(model.state_dict())
    in_report = [source for weight in report.weights for source in weight.sources]
    assert sorted(in_report) == sorted(in_the_file)
