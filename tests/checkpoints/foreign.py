"""Foreign checkpoints: each is built with the library that it comes from and saved in that library's own way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from tests.checkpoints import ways

HF_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip
HF_VIT: dict[str, Any] = HF_SIZES | {"intermediate_size": 64}
FIVE: dict[str, Any] = {"num_labels": 5}
CLIP_SIZES: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2}  # OpenAI's heads have 64 channels
LABELLED: dict[str, Any] = HF_VIT | FIVE
HF_SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
}  # fmt: skip
HF_DETECTOR: dict[str, Any] = HF_SWIN | {"out_features": ["stage1", "stage2"]}
DECODER: dict[str, Any] = {
    "mask_ratio": 0.0, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """How to make a checkpoint, what its network computes there, and what is expected of opening it."""

    label: str
    build: Callable[[], nn.Module]
    save: ways.Save
    layout: str
    output: Callable[[Any, Tensor], Tensor] = lambda model, images: model(images)
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 32

    def model(self) -> nn.Module:
        """The foreign network, its weights moved so that every part matters."""
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()


def logits(model: Any, images: Tensor) -> Tensor:
    """The logits of a classifier of transformers."""
    return model(images).logits


def class_token(model: Any, images: Tensor) -> Tensor:
    """The class token behind the last norm of a backbone of transformers."""
    return model(images).last_hidden_state[:, 0]


def timm_features(model: Any, images: Tensor) -> Tensor:
    """What timm hands to the classifier."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


TWO: dict[str, Any] = {"num_heads": 2}
FOUR: dict[str, Any] = {"num_heads": 4}
T = transformers

FOREIGN = (
    Foreign("registered ViT", lambda: timm.create_model("test_vit", num_classes=5), ways.safetensors_file, "timm",
            size=160),
    Foreign("timm ViT", ways.timm_vit(), ways.safetensors_file, "timm ViT", options=TWO),
    Foreign("timm ViT without qkv bias", ways.timm_vit(qkv_bias=False), ways.torch_file(), "timm ViT", options=TWO),
    Foreign("timm ViT with average pool", ways.timm_vit(global_pool="avg"), ways.torch_file(), "timm ViT", options=TWO),
    Foreign("timm ViT without class token", ways.timm_vit("vit_base_patch16_gap_224"), ways.torch_file(), "timm ViT",
            options=TWO),
    Foreign("timm ViT with pre-norm", ways.timm_vit("vit_base_patch16_clip_224"), ways.whole, "timm ViT"),
    Foreign("timm ViT with q and k norms", ways.timm_vit(qk_norm=True), ways.whole, "timm ViT"),
    Foreign("timm ViT of old patches", ways.timm_vit(), ways.torch_file(ways.old_patches), "timm ViT", options=TWO),
    Foreign("timm ViT of rectangular MLP", ways.timm_vit(mlp_ratio=2.7), ways.whole, "timm ViT"),
    Foreign("timm training checkpoint", ways.timm_vit(), ways.timm_saver, "timm ViT"),
    Foreign("timm hub folder", ways.timm_vit(), ways.timm_folder, "timm ViT"),
    Foreign("timm registers", ways.timm_vit("vit_small_patch14_reg4_dinov2"), ways.whole, "timm ViT"),
    Foreign("timm DeiT III", ways.timm_vit("deit3_small_patch16_224"), ways.torch_file(), "timm ViT", options=TWO),
    Foreign("official DeiT III", ways.timm_vit("deit3_small_patch16_224"), ways.torch_file(ways.official_deit3),
            "official DeiT III", options=TWO),
    Foreign("official distilled DeiT", ways.timm_vit("deit_tiny_distilled_patch16_224"),
            ways.torch_file(lambda state: {"model": state}), "distilled DeiT", options=TWO),
    Foreign("timm Swin", ways.timm_swin(), ways.safetensors_file, "timm Swin"),
    Foreign("timm Swin, pickled whole", ways.timm_swin(), ways.whole, "timm Swin"),
    Foreign("official Swin", ways.timm_swin(), ways.torch_file(ways.official_swin), "official Swin"),
    Foreign("Lightning", ways.timm_vit(), ways.torch_file(ways.lightning), "timm ViT", options=TWO),
    Foreign("data parallel and compiled", ways.timm_vit(), ways.torch_file(ways.prefixed("module._orig_mod.")),
            "timm ViT", options=TWO),
    Foreign("torch before 1.6", ways.timm_vit(), ways.torch_file(_use_new_zipfile_serialization=False), "timm ViT",
            options=TWO),
    Foreign("TorchScript", ways.timm_vit(), ways.scripted, "timm ViT", options=TWO),
    Foreign("numpy arrays", ways.timm_vit(), ways.as_pickle, "timm ViT", options=TWO),
    Foreign("OpenCLIP", ways.timm_vit(), ways.torch_file(ways.open_clip), "OpenCLIP around timm", options=TWO),
    Foreign("MAE", ways.timm_vit(), ways.torch_file(ways.mae), "MAE", timm_features, TWO),
    Foreign("MoCo v3", ways.timm_vit(), ways.torch_file(ways.moco), "MoCo v3", timm_features, TWO),
    Foreign("DINO", ways.timm_vit(), ways.torch_file(ways.dino), "timm ViT", timm_features, TWO),
    Foreign("torchvision ViT", lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5),
            ways.torch_file(), "torchvision ViT", options=FOUR),
    Foreign("torchvision Swin",
            lambda: torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5),
            ways.torch_file(), "torchvision Swin"),
    Foreign("Hugging Face ViT", lambda: T.ViTForImageClassification(T.ViTConfig(**LABELLED)),
            ways.hf_folder, "Hugging Face ViT", logits),
    Foreign("Hugging Face ViT, shards", lambda: T.ViTForImageClassification(T.ViTConfig(**LABELLED)),
            ways.hf_shards, "Hugging Face ViT", logits),
    Foreign("Hugging Face ViT, state dict", lambda: T.ViTForImageClassification(T.ViTConfig(**LABELLED)),
            ways.torch_file(), "Hugging Face ViT", logits, FOUR),
    Foreign("Hugging Face ViT, pickled whole", lambda: T.ViTForImageClassification(T.ViTConfig(**LABELLED)),
            ways.whole, "Hugging Face ViT", logits),
    Foreign("Hugging Face ViT, backbone", lambda: T.ViTModel(T.ViTConfig(**HF_VIT)), ways.hf_folder, "Hugging Face ViT",
            class_token),
    Foreign("Hugging Face DeiT", lambda: T.DeiTForImageClassification(T.DeiTConfig(**LABELLED)),
            ways.hf_folder, "Hugging Face DeiT", logits),
    Foreign("Hugging Face DeiT with teacher",
            lambda: T.DeiTForImageClassificationWithTeacher(T.DeiTConfig(**LABELLED)),
            ways.hf_folder, "Hugging Face DeiT with teacher", logits),
    Foreign("Hugging Face Swin", lambda: T.SwinForImageClassification(T.SwinConfig(**(HF_SWIN | FIVE))),
            ways.hf_folder, "Hugging Face Swin", logits),
    Foreign("Hugging Face Swin, backbone", lambda: T.SwinModel(T.SwinConfig(**HF_SWIN)), ways.hf_folder,
            "Hugging Face Swin", lambda model, images: model(images).pooler_output),
    Foreign("Hugging Face DINOv2", lambda: T.Dinov2Model(T.Dinov2Config(**HF_SIZES)), ways.hf_folder,
            "Hugging Face DINOv2", class_token),
    Foreign("Hugging Face DINOv2, classifier left out",
            lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**HF_SIZES)), ways.hf_folder,
            "Hugging Face DINOv2", lambda model, images: class_token(model.dinov2, images)),
    Foreign("Hugging Face DINOv2 with registers",
            lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**HF_SIZES)), ways.hf_folder,
            "Hugging Face DINOv2 with registers", class_token),
    Foreign("Hugging Face MAE", lambda: T.ViTMAEForPreTraining(T.ViTMAEConfig(**HF_VIT, **DECODER)), ways.hf_folder,
            "Hugging Face MAE", lambda model, images: class_token(model.vit, images)),
    Foreign("Hugging Face I-JEPA", lambda: T.IJepaForImageClassification(T.IJepaConfig(**LABELLED)),
            ways.hf_folder, "Hugging Face I-JEPA", logits),
    Foreign("Hugging Face CLIP",
            lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**HF_VIT, projection_dim=5)), ways.hf_folder,
            "Hugging Face CLIP", lambda model, images: model(images).image_embeds),
    Foreign("Hugging Face SigLIP", lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**HF_VIT)), ways.hf_folder,
            "Hugging Face SigLIP", lambda model, images: model(images).pooler_output),
    Foreign("timm SigLIP", ways.timm_vit("vit_base_patch16_siglip_224"), ways.whole, "timm ViT"),
    Foreign("OpenAI CLIP",
            lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**(HF_VIT | CLIP_SIZES), projection_dim=5)),
            ways.torch_file(ways.whole_clip), "OpenAI CLIP", lambda model, images: model(images).image_embeds),
    Foreign("OpenCLIP's own ViT, folder",
            lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**HF_VIT, projection_dim=5, hidden_act="gelu")),
            ways.open_clip_folder, "OpenCLIP", lambda model, images: model(images).image_embeds),
    Foreign("OpenAI's image tower alone",
            lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**HF_VIT, projection_dim=5)),
            ways.torch_file(ways.openai_clip), "OpenCLIP", lambda model, images: model(images).image_embeds,
            {"arch": "vit_base_patch32_clip_quickgelu_224", "num_heads": 4}),
    Foreign("mmpretrain ViT", ways.timm_vit("deit3_small_patch16_224"), ways.torch_file(ways.mmpretrain_vit),
            "mmpretrain ViT", options=TWO),
    Foreign("mmseg ViT", ways.timm_vit(final_norm=False), ways.torch_file(ways.mmseg_vit), "mmseg ViT", timm_features,
            TWO),
    Foreign("mmpretrain Swin", ways.timm_swin(), ways.torch_file(ways.openmmlab_swin()), "OpenMMLab Swin"),
    Foreign("mmdet Swin", ways.timm_swin(), ways.torch_file(ways.openmmlab_swin(norms=True)), "OpenMMLab Swin",
            timm_features),
    Foreign("Swin of the authors' detectors", ways.timm_swin(), ways.torch_file(ways.detectors_swin), "official Swin",
            timm_features),
    Foreign("Hugging Face Swin of a detector",
            lambda: T.SwinBackbone(T.SwinConfig(**HF_DETECTOR)), ways.hf_folder,
            "Hugging Face Swin", lambda model, images: model(images).feature_maps[-1].mean((2, 3))),
    Foreign("DINOv2", lambda: T.Dinov2Model(T.Dinov2Config(**HF_SIZES)), ways.torch_file(ways.facebook_dinov2()),
            "DINOv2", class_token, FOUR),
    Foreign("DINOv2 with registers", lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**HF_SIZES)),
            ways.torch_file(ways.facebook_dinov2()), "DINOv2", class_token, FOUR),
    Foreign("DINOv2 in training", lambda: T.Dinov2Model(T.Dinov2Config(**HF_SIZES)),
            ways.torch_file(ways.facebook_dinov2(blocks="blocks.0.{}.")), "DINOv2 in training", class_token, FOUR),
)  # fmt: skip
