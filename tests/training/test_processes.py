"""Two processes that each see half of the images end with the sums, the basis and the weights of one that sees all."""

from dataclasses import dataclass
from typing import Self

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes

from kcrprune.method.kernel_complexity import Covariance
from kcrprune.method.objective import Objective
from kcrprune.method.sums import Sums
from kcrprune.training.features import KernelWatch
from kcrprune.training.reconstruct import Reconstruction

SPLITS = ((0, 7), (7, 20))  # of unequal size
EVERY = 2


def features() -> Tensor:
    """Whole numbers (20, 6): their sums are exact in float64, in whatever order."""
    return torch.randint(-9, 10, (20, 6), generator=torch.Generator().manual_seed(0)).float()


@dataclass
class Several(Sums):
    """Two tensors of different shapes, and two counts."""

    rows: Tensor
    squares: Tensor
    images: int = 0
    seen: int = 0

    @classmethod
    def of(cls, x: Tensor) -> Self:
        return cls(x.sum(0).double(), (x.T @ x).double(), len(x), 1)


def streams() -> list[Tensor]:
    """Two batches (10, 3, 6)."""
    return list(torch.randn(2, 10, 3, 6, generator=torch.Generator().manual_seed(1)))


def reconstructed(batches: list[Tensor]) -> Tensor:
    """The weights of a block after two epochs towards another one's streams."""
    torch.manual_seed(0)
    block, wanted = nn.Linear(6, 6), nn.Linear(6, 6)
    with torch.no_grad():
        target = [wanted(batch) for batch in batches]
    Reconstruction(epochs=2, lr=0.01, seed=0, stage="test")(block, batches, target)
    return block.weight.detach()


def watch_of(seen: Covariance) -> KernelWatch:
    return KernelWatch(Objective(nn.Identity(), True, False, kernel_weight=0.1), seen, 0.4, EVERY)


def see(rank: int, folder) -> None:
    """What one of the two processes does; it leaves its findings in the folder."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    start, end = SPLITS[rank]
    own = features()[start:end]
    covariance = Covariance.empty(6).add_(own).sum_over_processes_()
    watch = watch_of(covariance)
    told = [watch.see_(batch) for batch in own.tensor_split(2 * EVERY)]
    several = Several.of(own).sum_over_processes_()
    weights = reconstructed([batch[start // 2 : end // 2] for batch in streams()])
    found = {
        "reconstructed": weights,
        "several": vars(several),
        "total": covariance.total,
        "images": covariance.images,
        "told": told,
        "basis": watch.objective.basis,
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    fork = "fork" in torch.multiprocessing.get_all_start_methods()  # spares each the import of torch
    start_processes(see, (folder,), nprocs=2, start_method="fork" if fork else "spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_the_sum_over_two_processes_is_the_one_shot_covariance(found):
    whole = Covariance.empty(6).add_(features())
    for each in found:
        assert each["images"] == whole.images
        assert torch.equal(each["total"], whole.total)


def test_every_field_of_sums_is_summed(found):
    merged = Several.of(features()[: SPLITS[0][1]]).merge_(Several.of(features()[SPLITS[1][0] :]))
    whole = Several.of(features())
    assert (merged.images, merged.seen) == (20, 2)
    assert torch.equal(merged.rows, whole.rows)
    assert torch.equal(merged.squares, whole.squares)
    for each in found:
        assert each["several"].keys() == vars(merged).keys()
        for name, expected in vars(merged).items():
            value = each["several"][name]
            assert type(value) is type(expected)
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected))


def test_a_watch_tells_kc_and_renews_its_basis_from_the_batches_of_both(found):
    watch = watch_of(Covariance.empty(6).add_(features()))
    halves = [features()[start:end].tensor_split(2 * EVERY) for start, end in SPLITS]
    told = [watch.see_(torch.cat(batches)) for batches in zip(*halves, strict=True)]
    assert watch.objective.basis is not None
    for each in found:
        assert each["told"] == told
        assert torch.equal(each["basis"], watch.objective.basis)
        assert ["kc" in figures for figures in each["told"]] == [False, True, False, True]


def test_a_block_is_trained_on_the_batches_of_both(found):
    alone = reconstructed(streams())
    for each in found:
        assert torch.equal(each["reconstructed"], found[0]["reconstructed"])
        assert torch.allclose(each["reconstructed"], alone, atol=1e-6)


def test_alone_a_sum_over_processes_changes_nothing():
    alone, untouched = (Covariance.empty(6).add_(features()) for _ in range(2))
    assert alone.sum_over_processes_() is alone
    assert torch.equal(alone.total, untouched.total)
    assert alone.images == untouched.images
