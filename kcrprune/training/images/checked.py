"""Whether all images of a set can be read, asked before anything is trained."""

from collections.abc import Callable
from typing import Final

from torch.utils.data import Dataset

from kcrprune.errors import DataError, ImageError
from kcrprune.training.images.batches import loader
from kcrprune.training.images.unreadable import some

FEW: Final = 4096  # images that are read faster than processes for them start
AT_ONCE: Final = 256


def require_readable(count: int, read: Callable[[int], object], workers: int) -> None:
    """DataError with the names of all of `count` images that `read`, by index, finds none in."""
    workers = min(workers, count // AT_ONCE) if count > FEW else 0
    looked = loader(_Complaints(count, read), workers, batch_size=AT_ONCE, collate_fn=list)
    bad = [complaint for batch in looked for complaint in batch if complaint is not None]
    if len(bad) == 1:
        raise DataError(bad[0][0])
    if bad:
        names = some(name for _, name in bad)
        raise DataError(
            f"{len(bad):,} of {count:,} images cannot be read ({names}); remove them; the first: {bad[0][0]}"
        )


class _Complaints(Dataset):
    """What `read` says against each image: an ImageError's sentence and name, or None."""

    def __init__(self, count: int, read: Callable[[int], object]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        try:
            self.read(index)
        except ImageError as error:
            return str(error), error.name
        return None
