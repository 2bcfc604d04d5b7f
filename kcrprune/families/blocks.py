"""Which blocks add their branches to the input of a norm, so that the refit can bring their stream back."""

from typing import Final

from timm.models import beit, cait, convit, eva, gcvit, nest, swin_transformer, volo, xcit
from timm.models import vision_transformer as vit
from timm.models import vision_transformer_relpos as relpos
from timm.models import vision_transformer_sam as sam

from kcrprune.families.contract import Branch, newer

Branches = dict[str, Branch]  # of one class of block, by name

_PLAIN: Final[Branches] = {"attn": Branch("norm1", "ls1", "norm2"), "mlp": Branch("norm2", "ls2")}
_GAMMAS: Final[Branches] = {"attn": Branch("norm1", "gamma_1", "norm2"), "mlp": Branch("norm2", "gamma_2")}

BLOCKS: Final[dict[type, Branches]] = {
    vit.Block: _PLAIN,
    swin_transformer.SwinTransformerBlock: _PLAIN,
    eva.EvaBlock: _GAMMAS,
    beit.Block: _GAMMAS,
    cait.LayerScaleBlock: _GAMMAS,
    convit.Block: _PLAIN,
    newer("deepseek_vit", "DeepseekVitBlock"): _PLAIN,
    gcvit.GlobalContextVitBlock: _PLAIN,
    nest.TransformerLayer: _PLAIN,
    relpos.RelPosBlock: _PLAIN,
    sam.Block: _PLAIN,
    volo.Outlooker: {"mlp": Branch("norm2")},
    volo.Transformer: _PLAIN,
    xcit.XCABlock: {"attn": Branch("norm1", "gamma1", "norm3"), "mlp": Branch("norm2", "gamma2")},
}
