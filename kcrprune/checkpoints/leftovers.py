"""What of a file may be left out, since the network computes the same without it; nothing else is.

A word stands for the first part of a name, below what the network and the tensor have in common.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from kcrprune.containers.contents import some
from kcrprune.errors import CheckpointError

# made anew from the sizes, or counted by a profiler; at the end of a name, wherever it stands
BUFFERS: Final = re.compile(
    r"(.*\.)?(relative_position_index|attn_mask|relative_coords_table|position_ids|total_ops|total_params)"
)
# used in training alone, or by a detector between the stages
TRAINING: Final = re.compile(
    r"norm\d|hidden_states_norms|mask_token|masked_embed|optimizer|lr|epoch|step|center|queue(_ptr)?|(\w+_)?(criterion|loss(es)?|metrics?|ema)"
    r"|(\w+_)?(projector|predictor|prototypes|discriminator)|(text_)?decoder(_\w+)?"
)
# heads of other tasks and towers for other inputs, beside a network that has a prefix of its own
BESIDE: Final = re.compile(
    r"(\w+_)?(head|heads|classifier|neck|fpn|rpn)(_\w+)?|fc|linear|(\w+_)?(teacher|student|momentum|target|online)(_\w+)?"
    r"|(text|visual|language|multi_modal|mm)_\w+|text|bert|lm_head|transformer(_module)?|token_embedding"
    r"|positional_embedding|ln_final|logit_(scale|bias)|input_resolution|context_length|vocab_size"
    r"|(bbox|class|query|level|mask)_embed(der)?|input_proj|label_enc"
)
HOME: Final = re.compile(r"(.*\.)?backbone\.")
ADAPTER: Final = re.compile(r"(.*\.)?(lora_\w+|base_layer|ia3_l|modules_to_save|hada_w\w+|oft_r|dora_\w+)(\..*)?")


def needed_inside(names: Iterable[str], network: Iterable[str] = ()) -> tuple[str, ...]:
    """Of names without a place in a network, given by the names that have one, those that may not be left out."""
    modules = {_first(name) for name in network}
    return tuple(
        sorted(
            name
            for name in names
            if not BUFFERS.fullmatch(name) and (_first(name) in modules or not TRAINING.fullmatch(_first(name)))
        )
    )


def needed_beside(names: Sequence[str], prefix: str, copies: Iterable[str] = ()) -> tuple[str, ...]:
    """Of names that do not begin with the network's prefix, those that may not be left out, sorted.

    `copies` are the prefixes of other networks of the file that the chosen one is preferred to.
    """
    home = HOME.match(prefix)  # what is called a backbone, and is the only one, is read by all around it
    others = (*copies, *(name for name in names if home and not name.startswith(home[0]) and "backbone" not in name))
    relative = {name: _below_common(name, prefix) for name in names if not name.startswith(others)}
    needed = needed_inside(relative.values())
    return tuple(
        sorted(
            name
            for name, rest in relative.items()
            if rest in needed and not (prefix and BESIDE.fullmatch(_first(rest)))
        )
    )


def refuse(names: Iterable[str], what: object) -> None:
    """CheckpointError where names are left that a network's outputs may depend on."""
    if needed := tuple(names):
        raise CheckpointError(
            f"{what} holds {len(needed)} tensors that timm's network has no place for ({some(needed)}), so it is "
            "another network than it seems; if they serve training alone, save the weights without them"
        )


def refuse_adapters(names: Iterable[str], what: object) -> None:
    """CheckpointError for weights that adapters are to be added to, or for adapters alone."""
    if found := sorted(name for name in names if ADAPTER.fullmatch(name)):
        raise CheckpointError(
            f"{what} holds adapters that are not merged into the network ({some(found)}); merge them first, with peft "
            "`model = model.merge_and_unload()`, and save the whole network"
        )


def _first(name: str) -> str:
    return name.partition(".")[0]


def _below_common(name: str, prefix: str) -> str:
    """What a name has behind the parts that it shares with a prefix."""
    parts, shared = name.split("."), prefix.split(".")
    count = 0
    while count < min(len(parts) - 1, len(shared)) and parts[count] == shared[count]:
        count += 1
    return ".".join(parts[count:])
