"""Which layouts are known: the first that matches is taken, so the special ones come first."""

from typing import Final

from kcrprune.artifact.layouts import timm
from kcrprune.artifact.layouts.base import Layout

LAYOUTS: Final[tuple[Layout, ...]] = (
    timm.OFFICIAL_SWIN,
    timm.SWIN,
    timm.DISTILLED,
    timm.VIT,
)
