"""Reports of a network that nobody made, for tests of their form."""

from kcrprune.measure.report import (
    Accuracy,
    BlockWidths,
    Comparison,
    Inspection,
    KernelFigures,
    ModelReport,
    StageTime,
)
from kcrprune.plan import Preprocessing

KERNEL = KernelFigures(
    kc=0.108, h=12, tnn=0.9, kc_normalised=0.05, tnn_relative=0.2, effective_rank=9.5, rank=19, images=2048
)
BLOCK = BlockWidths(site="blocks.0", dense={"mlp_hidden": 96, "heads": 2}, kept={"mlp_hidden": 40, "heads": 2})


def report(**changes):
    known = {
        "source": "in/vit.pth",
        "layout": "timm",
        "state": "dense",
        "architecture": "vit_small_patch16_224",
        "family": "vit",
        "input_size": (3, 224, 224),
        "parameters": 22_050_664,
        "macs": 4_598_882_304,
        "dense_macs": 4_598_882_304,
        "file_bytes": 88_270_000,
        "kernel": KERNEL,
        "accuracy": Accuracy(images=10_000, top1=0.8465, loss=0.5),
        "notes": ("no data: images were generated",),
    }
    return ModelReport.model_validate(known | changes)


AFTER = report(
    source="run/model.safetensors",
    state="pruned",
    macs=3_219_217_613,
    parameters=15_000_000,
    blocks=(BLOCK,),
    accuracy=Accuracy(images=10_000, top1=0.8425, agreement=0.95),
)
COMPARISON = Comparison(
    before=report(),
    after=AFTER,
    stages=(
        StageTime(stage="order", seconds=4, algebra_seconds=3, passes=2.5),
        StageTime(stage="search", seconds=75, peak_memory_mib=1000),
        StageTime(stage="cut", seconds=0.5),
    ),
    settings={"target_flops": 0.7, "recipe": "default"},
)
INSPECTION = Inspection(
    source="in/vit.pth",
    layout="official DeiT",
    architecture="deit_tiny_patch16_224",
    family="vit",
    preprocessing=Preprocessing(input_size=(3, 224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    class_count=1000,
    parameters=5_717_416,
    macs=1_253_700_000,
    file_bytes=22_900_000,
    axes=("mlp_hidden",),
    floor={"default": 0.12, "paper": 0.444},
    notes=("the keys are timm's",),
    foreign_names=("argparse.Namespace",),
)
