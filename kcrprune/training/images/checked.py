"""Whether all images of a set can be read, asked before anything is trained."""

from collections.abc import Callable, Sequence
from typing import Final

from torch.utils.data import Dataset

from kcrprune import processes
from kcrprune.errors import DataError, ImageError
from kcrprune.training.images.batches import loader
from kcrprune.training.images.unreadable import some

FEW: Final = 4096  # images that are read faster than processes for them start
AT_ONCE: Final = 256


def require_readable(count: int, read: Callable[[int], object], workers: int) -> None:
    """DataError with the names of all of `count` images that `read`, by index, finds none in.

    Of several processes each looks at a part of them.
    """
    part = processes.own(range(count))
    workers = min(workers, len(part) // AT_ONCE) if len(part) > FEW else 0
    looked = loader(_Complaints(part, read), workers, batch_size=AT_ONCE, collate_fn=list)
    found = [complaint for batch in looked for complaint in batch if complaint is not None]
    bad = [complaint for of_one in processes.of_all(found) for complaint in of_one]
    if len(bad) == 1:
        raise DataError(bad[0][0])
    if bad:
        names = some(name for _, name in bad)
        raise DataError(
            f"{len(bad):,} of {count:,} images cannot be read ({names}); remove them; the first: {bad[0][0]}"
        )


class _Complaints(Dataset):
    """What `read` says against each image: an ImageError's sentence and name, or None."""

    def __init__(self, part: Sequence[int], read: Callable[[int], object]) -> None:
        self.part, self.read = part, read

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        try:
            self.read(self.part[index])
        except ImageError as error:
            return str(error), error.name
        return None
