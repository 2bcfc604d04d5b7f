"""Which layouts are known: the first that matches is taken, so the special ones come first."""

from typing import Final

from kcrprune.checkpoints.layouts import clip, huggingface, openmmlab, selfsupervised, timm, torchvision
from kcrprune.checkpoints.layouts.base import Layout

LAYOUTS: Final[tuple[Layout, ...]] = (
    timm.REGISTERED,
    timm.OFFICIAL_SWIN,
    timm.SWIN,
    timm.DISTILLED,
    selfsupervised.MAE,
    selfsupervised.MOCO,
    selfsupervised.DINOV2_CHUNKED,
    selfsupervised.DINOV2,
    timm.DEIT3,
    timm.OPEN_CLIP,
    timm.VIT,
    torchvision.VIT,
    torchvision.SWIN,
    huggingface.DISTILLED_DEIT,
    huggingface.DEIT,
    huggingface.MAE,
    huggingface.IJEPA,
    huggingface.REGISTERS,
    huggingface.DINOV2_CLASSIFIER,
    huggingface.DINOV2,
    huggingface.VIT,
    huggingface.SWIN,
    huggingface.CLIP,
    huggingface.SIGLIP,
    clip.OPENAI,
    clip.OPEN_CLIP,
    openmmlab.VIT,
    openmmlab.MMSEG_VIT,
    openmmlab.SWIN,
)
