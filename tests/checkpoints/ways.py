"""Ways in which the libraries that people use save a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

State = dict[str, Tensor]
Save = Callable[[nn.Module, Path], Path]


def timm_vit(name: str = "vit_tiny_patch16_224", **arguments: Any) -> Callable[[], nn.Module]:
    """A tiny network of timm."""
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    } | arguments
    return lambda: timm.create_model(name, **sizes)


def timm_swin(**arguments: Any) -> Callable[[], nn.Module]:
    """A tiny Swin of timm; 8 by 8 patches, then 4 by 4."""
    sizes: dict[str, Any] = {
        "img_size": 32,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
    } | arguments
    return lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes)


def torch_file(wrap: Callable[[State], Any] = lambda state: state, **how: Any) -> Save:
    """torch.save of the state dict, wrapped."""

    def save(model: nn.Module, folder: Path) -> Path:
        path = folder / "checkpoint.pth"
        torch.save(wrap(dict(model.state_dict())), path, **how)
        return path

    return save


def safetensors_file(model: nn.Module, folder: Path) -> Path:
    """The state dict as safetensors."""
    path = folder / "weights.safetensors"
    save_file(dict(model.state_dict()), path)
    return path


def whole(model: nn.Module, folder: Path) -> Path:
    """The module itself, pickled."""
    path = folder / "whole.pth"
    torch.save(model, path)
    return path


def scripted(model: nn.Module, folder: Path) -> Path:
    """A TorchScript archive."""
    path = folder / "scripted.pt"
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 32, 32), check_trace=False), path)
    return path


def timm_saver(model: nn.Module, folder: Path) -> Path:
    """timm's own training checkpoint, whose moving average differs from its last weights."""
    from argparse import Namespace

    from timm.utils.checkpoint_saver import CheckpointSaver
    from timm.utils.model_ema import ModelEmaV2

    average = ModelEmaV2(model)
    last = timm_vit()()
    args = Namespace(model="vit_tiny_patch16_224", lr=0.1, model_kwargs={"num_heads": 2})
    optimizer = torch.optim.SGD(last.parameters(), 0.1)
    saver = CheckpointSaver(last, optimizer, args, average, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(0, 0.5)
    return folder / "last.pth.tar"


def timm_folder(model: nn.Module, folder: Path) -> Path:
    """timm's folder for the Hugging Face hub: model.safetensors with a config.json."""
    from timm.models import save_for_hf

    save_for_hf(model, str(folder), safe_serialization=True, model_config={"label_names": list("abcde")})
    return folder


def hf_folder(model: Any, folder: Path) -> Path:
    """transformers' folder."""
    model.save_pretrained(folder)
    return folder


def hf_shards(model: Any, folder: Path) -> Path:
    """transformers' folder with many shards."""
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def prefixed(prefix: str, **beside: Tensor) -> Callable[[State], State]:
    """Every name behind a prefix, with other tensors beside."""
    return lambda state: {prefix + name: value for name, value in state.items()} | beside


def official_swin(state: State) -> dict[str, State]:
    """Microsoft's names: patch merging at the end of a stage, the head without `fc`, the buffers kept."""
    renamed = {name.replace("head.fc.", "head."): value for name, value in state.items()}
    renamed = {name.replace("layers.1.downsample", "layers.0.downsample"): value for name, value in renamed.items()}
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return {"model": renamed}


def official_deit3(state: State) -> dict[str, State]:
    """DeiT III's names for LayerScale."""
    return {
        "model": {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): state[name] for name in state}
    }


def facebook_dinov2(*, blocks: str = "blocks.{}.") -> Callable[[State], State]:
    """Hugging Face's DINOv2 under Facebook's names: q, k and v joined, mask and register tokens kept."""
    plain = {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "attention.o_proj": "attn.proj"}
    outer = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.position_embeddings": "pos_embed",
    }
    outer |= {"embeddings.": "", "layernorm.": "norm."}

    def convert(state: State) -> State:
        converted: State = {}
        for name, value in state.items():
            new = name
            for old, replacement in (plain | outer).items():
                new = new.replace(old, replacement)
            for index in range(2):
                new = new.replace(f"encoder.layer.{index}.", blocks.format(index))
            if "attention.q_proj" in new:
                others = [state[name.replace("q_proj", other)] for other in ("k_proj", "v_proj")]
                new, value = new.replace("attention.q_proj", "attn.qkv"), torch.cat([value, *others])
            if "attention." not in new:
                converted[new] = value
        return converted

    return convert


def mae(state: State) -> dict[str, State]:
    """MAE's pretraining checkpoint: no head, a decoder beside the encoder."""
    encoder = {name: value for name, value in state.items() if not name.startswith("head.")}
    width = torch.zeros(16, 24)
    decoder = {"mask_token": width[:1, None, :], "decoder_embed.weight": width, "decoder_pred.weight": width}
    return {"model": encoder | decoder}


def moco(state: State) -> dict[str, Any]:
    """MoCo v3: a trained and a momentum encoder, each with a projection head."""
    encoder = {name: value for name, value in state.items() if not name.startswith("head.")}
    head = {"head.0.weight": torch.zeros(8, 24), "head.3.weight": torch.zeros(8, 8)}
    momentum = {name: value + 1 for name, value in encoder.items()}
    weights = prefixed("module.base_encoder.")(encoder | head) | prefixed("module.momentum_encoder.")(momentum)
    return {"epoch": 300, "arch": "vit_small", "state_dict": weights}


def dino(state: State) -> dict[str, Any]:
    """DINO: student and teacher with projection heads."""
    backbone = {name: value for name, value in state.items() if not name.startswith("head.")}
    student = {name: value + 1 for name, value in backbone.items()}
    head = {"head.last_layer.weight": torch.zeros(8, 24)}
    return {
        "student": prefixed("module.backbone.")(student),
        "teacher": prefixed("backbone.")(backbone) | head,
        "epoch": 100,
    }


def lightning(state: State) -> dict[str, Any]:
    """A checkpoint of Lightning whose module keeps the network as `self.model`."""
    weights = prefixed("model.", **{"criterion.weight": torch.zeros(5)})(state)
    return {"state_dict": weights, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 0.1}, "callbacks": {}}


def arrays(state: State) -> dict[str, Any]:
    """numpy arrays, as Detectron keeps them."""
    return {"model": {name: value.numpy() for name, value in state.items()}}


def as_pickle(model: nn.Module, folder: Path) -> Path:
    """A bare pickle of arrays."""
    import pickle

    path = folder / "model.pkl"
    path.write_bytes(pickle.dumps(arrays(dict(model.state_dict()))))
    return path


def open_clip(state: State) -> State:
    """OpenCLIP around timm: the trunk, a projection, a text tower."""
    trunk = {f"visual.trunk.{name}": value for name, value in state.items() if not name.startswith("head.")}
    projection = {"visual.head.proj.weight": state["head.weight"], "visual.head.proj.bias": state["head.bias"]}
    return trunk | projection | {"transformer.resblocks.0.ln_1.weight": torch.zeros(4), "logit_scale": torch.zeros(())}


def old_patches(state: State) -> State:
    """timm's first ViTs: the patch embedding as a matrix."""
    return state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}


def openai_clip(state: State) -> State:
    """Hugging Face's CLIP image tower under the names of OpenAI: joined q, k and v, the projection turned."""
    plain = {"self_attn.out_proj": "attn.out_proj", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    outer = {
        "embeddings.patch_embedding": "conv1",
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
    }
    converted: State = {}
    for name, value in state.items():
        new = name.removeprefix("vision_model.")
        for old, replacement in (plain | outer).items():
            new = new.replace(old, replacement)
        if "q_proj." in name:
            value = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            new = new.replace("self_attn.q_proj.", "attn.in_proj_")
        if not any(part in name for part in ("k_proj.", "v_proj.", "visual_projection")):
            converted[new] = value
    return converted | {"proj": state["visual_projection.weight"].T.contiguous()}


def whole_clip(state: State) -> State:
    """Image tower, text tower and the three numbers that the files of OpenAI have."""
    text = {"transformer.resblocks.0.ln_1.weight": torch.zeros(4), "positional_embedding": torch.zeros(7, 4)}
    numbers = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size", "logit_scale")}
    return prefixed("visual.")(openai_clip(state)) | text | numbers


def open_clip_folder(model: nn.Module, folder: Path) -> Path:
    """OpenCLIP's folder for the Hugging Face hub."""
    import json

    torch.save(prefixed("visual.")(openai_clip(dict(model.state_dict()))), folder / "open_clip_pytorch_model.bin")
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8}
    config = {"model_cfg": {"vision_cfg": vision, "quick_gelu": False}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


MM = {
    "patch_embed.proj.": "patch_embed.projection.", "mlp.fc1.": "ffn.layers.0.0.", "mlp.fc2.": "ffn.layers.1.",
}  # fmt: skip


def _in_words_of(state: State, words: dict[str, str]) -> State:
    renamed: State = {}
    for name, value in state.items():
        new = name
        for old, replacement in words.items():
            new = new.replace(old, replacement)
        renamed[new] = value
    return renamed


def mmpretrain_vit(state: State) -> dict[str, Any]:
    """The ViT of mmpretrain with its classifier."""
    own = {name: value for name, value in state.items() if not name.startswith("head.")}
    blocks = {".norm1.": ".ln1.", ".norm2.": ".ln2.", "blocks.": "layers.", "ls1.gamma": "attn.gamma1.weight"}
    named = _in_words_of(own, MM | blocks | {"ls2.gamma": "ffn.gamma2.weight"})
    named = {("ln1" + name.removeprefix("norm") if name.startswith("norm.") else name): named[name] for name in named}
    head = {f"head.layers.head.{part}": state[f"head.{part}"] for part in ("weight", "bias")}
    return {"meta": {"epoch": 1}, "state_dict": prefixed("backbone.")(named) | head}


def mmseg_vit(state: State) -> dict[str, Any]:
    """The ViT of mmseg, which has no last norm, inside a segmenter."""
    own = {name: value for name, value in state.items() if not name.startswith("head.")}
    blocks = {".norm1.": ".ln1.", ".norm2.": ".ln2.", "blocks.": "layers.", "attn.qkv.": "attn.attn.in_proj_"}
    named = _in_words_of(own, MM | {"attn.proj.": "attn.attn.out_proj."} | blocks)
    beside = {"decode_head.conv_seg.weight": torch.zeros(2, 3), "auxiliary_head.0.conv_seg.bias": torch.zeros(2)}
    return {"meta": {"CLASSES": ("a", "b")}, "state_dict": prefixed("backbone.")(named) | beside}


def openmmlab_swin(*, norms: bool = False) -> Callable[[State], dict[str, Any]]:
    """The Swin of mmpretrain, or of mmdet with a norm behind each stage; patch merging as its converter writes it."""

    def merged(name: str, value: Tensor) -> Tensor:
        if "downsample." not in name:
            return value
        columns = value.reshape(*value.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
        return columns.transpose(-1, -2).reshape(value.shape)

    def convert(state: State) -> dict[str, Any]:
        own = {name: merged(name, value) for name, value in state.items() if not name.startswith("head.")}
        attention = {"attn.": "attn.w_msa.", "layers.1.downsample": "layers.0.downsample"}
        named = {name.replace("layers.", "stages.", name.startswith("layers.")): value
                 for name, value in _in_words_of(own, attention).items()}  # fmt: skip
        named = _in_words_of(named, MM)
        last = "norm1."
        backbone = {(last + name[5:] if name.startswith("norm.") else name): named[name] for name in named}
        beside = {"head.fc.weight": state["head.fc.weight"], "head.fc.bias": state["head.fc.bias"]}
        if norms:
            beside = {"neck.lateral_convs.0.conv.weight": torch.zeros(1)}
            backbone |= {"norm0.weight": torch.zeros(16), "norm0.bias": torch.zeros(16)}
        return {"state_dict": prefixed("backbone.")(backbone) | beside}

    return convert


def detectors_swin(state: State) -> dict[str, State]:
    """The Swin of the authors' detectors: official names, a norm behind each stage, no classifier."""
    own = {name: value for name, value in official_swin(state)["model"].items() if not name.startswith("head.")}
    named = {("norm1." + name[5:] if name.startswith("norm.") else name): value for name, value in own.items()}
    norms = {"norm0.weight": torch.zeros(16), "norm0.bias": torch.zeros(16)}
    return {"state_dict": prefixed("backbone.")(named | norms) | {"rpn_head.rpn_conv.weight": torch.zeros(1)}}
