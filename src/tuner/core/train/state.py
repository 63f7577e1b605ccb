"""What a run remembers in a checkpoint, and taking it up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tuner.core.adapters.network import load_network_tensors, network_tensors
from tuner.core.data.ledger import changes_since
from tuner.core.errors import UsageError
from tuner.core.optim import load_optimizer_state, optimizer_state_tensors
from tuner.core.train.checkpoint import Position, State

if TYPE_CHECKING:
    import torch

    from tuner.core.config import RunConfig
    from tuner.core.data.ledger import Ledger
    from tuner.core.data.plan import DataPlan
    from tuner.core.optim import Ema
    from tuner.core.train.average import LossAverage
    from tuner.core.train.folder import RunFolder
    from tuner.core.types import Network


@dataclass(slots=True, kw_only=True)
class RunState:
    """The parts of a run whose values a checkpoint holds. names: trained parameters by name. base_losses: of the
    held-out images, by the base model, where it is gone once weights have trained. offloaded: the optimizer's state
    lives in host memory.
    """

    network: Network
    optimizer: torch.optim.Optimizer
    names: Mapping[str, nn.Parameter]
    ema: Ema | None
    average: LossAverage
    ledger: Ledger
    base_losses: list[list[float]] | None = None
    offloaded: bool = False

    def capture(self, position: Position) -> State:
        """The present values; tensors are live, so write them before the next update."""
        optimizer_tensors, optimizer_scalars = optimizer_state_tensors(self.optimizer, dict(self.names))
        groups = {
            "network": network_tensors(self.network),
            "optimizer": optimizer_tensors,
            "ema": self.ema.state() if self.ema is not None else {},
        }
        return State(
            position=position,
            tensors={f"{group}/{name}": value for group, tensors in groups.items() for name, value in tensors.items()},
            scalars={
                "optimizer": optimizer_scalars,
                "loss_average": self.average.values,
                "ledger": self.ledger.state(),
                "base_losses": self.base_losses,
            },
        )

    def restore(self, state: State) -> None:
        """Take up the values of ``state`` in place; UsageError when they belong to another network or optimizer."""
        load_network_tensors(self.network, network_part(state))
        load_optimizer_state(
            self.optimizer,
            dict(self.names),
            _below(state.tensors, "optimizer/"),
            state.scalars["optimizer"],
            offloaded=self.offloaded,
        )
        if self.ema is not None:
            self.ema.load(_below(state.tensors, "ema/"))
        self.average.values = list(state.scalars["loss_average"])
        self.ledger.load(state.scalars["ledger"])
        self.base_losses = state.scalars.get("base_losses")


def network_part(state: State) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint, as `network_tensors` names them."""
    return _below(state.tensors, "network/")


def first_position(config: RunConfig, plan: DataPlan) -> Position:
    """Where a run begins that has no state: at its first update, or after those that ``checkpoint.start_at`` skips."""
    start = plan.total_steps(config.train) - plan.left_steps(config)
    epoch, done = divmod(start, plan.steps_per_epoch(config.train.accumulate))
    batch = done * config.train.accumulate
    return Position(step=start, epoch=epoch, batch=batch, seed=config.train.seed, fingerprint=plan.fingerprint)


def check_continues(state: State, folder: RunFolder, *, total: int, seed: int) -> None:
    """Raise UsageError when the run is over already, or when its random choices would be others."""
    position = state.position
    if position.step >= total and folder.final.exists():
        raise UsageError(
            f"this run is already at step {position.step} of {total}",
            where=str(folder.path),
            fix="raise train.steps or train.epochs to train on",
        )
    if position.seed != seed:
        raise UsageError(
            f"the checkpoint was made with seed {position.seed}, not {seed}",
            where="train.seed",
            why="the order of the data and all noise follow from it, so this would be another run",
            fix=f"set train.seed to {position.seed}, or start from its adapter with network.init_from",
        )


def next_position(position: Position, plan: DataPlan, folder: RunFolder, *, strict: bool) -> tuple[Position, str]:
    """Where to go on, and what changed in the data since then ("" for nothing).

    Changed data has another order: a started epoch cannot be finished, the next one begins. strict: refuse instead.
    """
    if position.fingerprint == plan.fingerprint:
        return position, ""
    changes = "; ".join(changes_since(folder.ledger, plan)) or "settings of the sources differ"
    if strict:
        raise UsageError(
            "the data changed since the checkpoint was written",
            where=str(folder.path),
            why=changes,
            fix="restore the data, or set checkpoint.strict_data to false to go on at the next epoch",
        )
    epoch = position.epoch + 1 if position.batch > 0 else position.epoch
    return replace(position, epoch=epoch, batch=0, fingerprint=plan.fingerprint), changes


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
