"""Which MLPs can be cut: for each class what writes its hidden units and what reads them."""

from typing import Any, Final

from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.gemma4_vit import Gemma4GatedMlp
from timm.models.vitamin import GeGluMlp
from torch import nn

from kcrprune.families.contract import Group, Rule, Slot
from kcrprune.families.linears import is_linear

COORDINATES: Final = 3  # an MLP that reads no more is one of positions, inside an attention, and no branch


def _rule(*writers: str, reader: str = "fc2", norm: str = "norm", packed: bool = False) -> Rule:
    """The rule of an MLP: `writers`, a norm where there is one, and a reader; packed: one writer of two halves."""

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        last: Any = module.get_submodule(reader)
        first: Any = module.get_submodule(writers[0])
        if not is_linear(last) or first.weight.shape[1] <= COORDINATES:
            return ()
        width, hidden = last.weight.shape[:2]
        starts = (0, hidden) if packed else (0,)
        written = tuple(Slot(f"{site}.{name}", 0, start) for name in writers for start in starts)
        between = f"{site}.{norm}" if norm and not isinstance(module.get_submodule(norm), nn.Identity) else None
        over_positions = isinstance(last, nn.Conv2d)  # timm's has 1x1 convolutions as well
        if over_positions and between:
            return ()
        io = (
            Group(
                site,
                "mlp_io",
                1,
                width,
                (Slot(f"{site}.{reader}", 0),),
                tuple(Slot(f"{site}.{name}", 1) for name in writers),
                wide=True,
            ),
        )
        inner = (
            Group(
                site,
                "mlp_hidden",
                1,
                hidden,
                written + ((Slot(between, 0),) if between else ()),
                (Slot(f"{site}.{reader}", 1),),
                norm=between,
            ),
        )
        return inner if over_positions else io + inner  # no stream of feature maps is gathered

    return groups


MLPS: Final[dict[type, Rule]] = {
    Mlp: _rule("fc1"),
    GluMlp: _rule("fc1", packed=True),
    SwiGLU: _rule("fc1_g", "fc1_x"),
    GeGluMlp: _rule("w0", "w1", reader="w2", norm=""),  # its norm lies before them
    Gemma4GatedMlp: _rule("gate_proj.linear", "up_proj.linear", reader="down_proj.linear", norm=""),
}
