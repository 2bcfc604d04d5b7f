"""Which MLPs can be cut: for each class what writes its hidden units and what reads them."""

from typing import Any, Final

from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import nn

from kcrprune.families.contract import Group, Rule, Slot
from kcrprune.families.linears import is_linear


def _rule(*writers: str, packed: bool = False) -> Rule:
    """The rule of an MLP: `writers`, a norm where there is one, and fc2; packed: one writer of two halves."""

    def groups(site: str, module: nn.Module) -> tuple[Group, ...]:
        mlp: Any = module
        if not is_linear(mlp.fc2) or (isinstance(mlp.fc2, nn.Conv2d) and not isinstance(mlp.norm, nn.Identity)):
            return ()
        width, hidden = mlp.fc2.weight.shape[:2]
        starts = (0, hidden) if packed else (0,)
        written = tuple(Slot(f"{site}.{name}", 0, start) for name in writers for start in starts)
        norm = None if isinstance(mlp.norm, nn.Identity) else f"{site}.norm"
        io = (
            Group(
                site,
                "mlp_io",
                1,
                width,
                (Slot(f"{site}.fc2", 0),),
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
                written + ((Slot(norm, 0),) if norm else ()),
                (Slot(f"{site}.fc2", 1),),
                norm=norm,
            ),
        )
        return io + inner if isinstance(mlp.fc2, nn.Linear) else inner  # no stream of 1x1 convolutions is gathered

    return groups


MLPS: Final[dict[type, Rule]] = {
    Mlp: _rule("fc1"),
    GluMlp: _rule("fc1", packed=True),
    SwiGLU: _rule("fc1_g", "fc1_x"),
}
