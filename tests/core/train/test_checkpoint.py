"""A checkpoint is whole or not there, says when it is damaged, and an older one takes its place."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import golden
from tuner.core.errors import UsageError
from tuner.core.train.average import LossAverage
from tuner.core.train.checkpoint import (
    STATE_JSON,
    STATE_TENSORS,
    CheckpointWriter,
    Position,
    State,
    find_state,
    list_checkpoints,
    read_state,
    write_state,
)
from tuner.core.train.folder import RunFolder

GOLDEN = golden("core/checkpoints.json")


def make_state(step: int) -> State:
    position = Position(step=step, epoch=1, batch=2, seed=3, fingerprint="f")
    return State(position=position, tensors={"a": torch.arange(4.0) + step}, scalars={"loss": [0.1, 0.2]})


def write(folder: RunFolder, *steps: int, keep_last: int | None = None, state: str = "every", **more: int) -> None:
    rolling = "keep_rolling" in more
    writer = CheckpointWriter(folder, keep_last=keep_last, state=state, **more)
    for step in steps:
        building = writer.begin(step)
        write_state(building, make_state(step))
        (building / folder.checkpoint_file(step).name).write_bytes(b"adapter")
        writer.commit(building, step, rolling=rolling)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "hero", "hero")


def test_a_state_reads_back_as_it_was_written(folder):
    write(folder, 10)
    state = read_state(folder.checkpoint(10))
    assert state.position == make_state(10).position
    assert state.scalars == {"loss": [0.1, 0.2]}
    assert torch.equal(state.tensors["a"], make_state(10).tensors["a"])


def test_tensors_of_every_type_and_size_read_back(tmp_path):
    types = (torch.uint8, torch.float32, torch.bool, torch.bfloat16, torch.int64, torch.float64, torch.float8_e4m3fn)
    tensors = {f"{number}": torch.arange(3 + number).to(dtype) for number, dtype in enumerate(types)}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "turned": torch.arange(6.0).view(2, 3).t()}
    write_state(tmp_path, State(position=make_state(1).position, tensors=tensors, scalars={}))
    found = read_state(tmp_path).tensors
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name].double(), value.double())


def test_a_type_that_no_file_has_is_refused(tmp_path):
    state = State(position=make_state(1).position, tensors={"a": torch.zeros(2, dtype=torch.complex64)}, scalars={})
    with pytest.raises(UsageError, match="complex64"):
        write_state(tmp_path, state)


@pytest.mark.parametrize("name", [STATE_JSON, STATE_TENSORS])
def test_a_flipped_bit_is_noticed(folder, name):
    write(folder, 10)
    path = folder.checkpoint(10) / name
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        read_state(folder.checkpoint(10))


def test_the_newest_whole_checkpoint_is_found(folder):
    write(folder, 10, 20, 30)
    (folder.checkpoint(30) / STATE_TENSORS).write_bytes(b"torn")
    path, state = find_state(folder, "auto")
    assert (path, state.position.step) == (folder.checkpoint(20), 20)


def test_a_damaged_later_checkpoint_costs_no_good_one(folder):
    write(folder, 10, 20, 30)
    (folder.checkpoint(30) / STATE_TENSORS).write_bytes(b"torn")
    write(folder, 25, keep_last=1, state="last")
    path, state = find_state(folder, "auto")
    assert (path, state.position.step) == (folder.checkpoint(25), 25)
    write(folder, 30, keep_last=1, state="last")
    assert list_checkpoints(folder) == [folder.checkpoint(30)]
    assert find_state(folder, "auto")[1].position.step == 30


def test_going_back_inside_a_folder_is_refused_because_two_histories_would_mix(folder, tmp_path):
    write(folder, 10, 20)
    with pytest.raises(UsageError, match="went on after step-000010"):
        find_state(folder, str(folder.checkpoint(10)))
    assert find_state(folder, str(folder.checkpoint(20)))[1].position.step == 20
    assert find_state(RunFolder(tmp_path / "other", "other"), str(folder.checkpoint(10)))[1].position.step == 10


def test_checkpoints_are_ordered_by_number(folder):
    write(folder, 1_000_000, 999_999)
    assert list_checkpoints(folder) == [folder.checkpoint(999_999), folder.checkpoint(1_000_000)]


def test_a_run_without_any_whole_checkpoint_says_so(folder):
    write(folder, 10)
    (folder.checkpoint(10) / STATE_TENSORS).write_bytes(b"torn")
    with pytest.raises(UsageError, match="no checkpoint"):
        find_state(folder, "auto")
    assert find_state(RunFolder(folder.path.with_name("fresh"), "fresh"), "auto") is None


def test_an_abandoned_attempt_leaves_nothing_and_spoils_nothing(folder):
    write(folder, 10)
    writer = CheckpointWriter(folder, keep_last=None, state="last")
    building = writer.begin(20)
    (building / "half").touch()
    assert list_checkpoints(folder) == [folder.checkpoint(10)]
    assert not (writer.begin(20) / "half").exists()
    writer.abandon(building)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000010"]


def test_only_the_last_checkpoint_keeps_its_state_when_asked(folder):
    write(folder, 10, 20, state="last")
    assert not (folder.checkpoint(10) / STATE_TENSORS).exists()
    assert folder.checkpoint_file(10).exists()
    assert read_state(folder.checkpoint(20)).position.step == 20


def test_the_rolling_series_has_a_retention_of_its_own(folder):
    write(folder, 10)
    write(folder, 12, 14, 16, keep_rolling=2)
    assert list_checkpoints(folder) == [folder.checkpoint(step) for step in (10, 14, 16)]
    write(folder, 20, keep_last=1, state="last")
    assert list_checkpoints(folder) == [folder.checkpoint(16), folder.checkpoint(20)]
    assert find_state(folder, "auto")[0] == folder.checkpoint(20)
    write(folder, 22, keep_last=1, keep_rolling=1, state="last")
    assert list_checkpoints(folder) == [folder.checkpoint(20), folder.checkpoint(22)]
    assert not (folder.checkpoint(20) / STATE_TENSORS).exists()


@pytest.mark.parametrize("row", GOLDEN["retention"], ids=lambda row: "-".join(str(value) for value in row.values()))
def test_retention_removes_what_the_reference_removes(folder, row):
    """Counts there are epochs or steps; here they are a number of checkpoints, which is what an importer writes."""
    if "epoch" in row:
        every, now, gone = row["save_every_n_epochs"], row["epoch"], row["remove_epoch"]
        keep = row["save_last_n_epochs"]
    else:
        every, now, gone = row["save_every_n_steps"], row["step"], row["remove_step"]
        keep = row["save_last_n_steps"] // every + 1
    before = range(every, now, every)
    write(folder, *before, keep_last=None)
    existing = {path.name for path in list_checkpoints(folder)}
    write(folder, now, keep_last=keep)
    removed = existing - {path.name for path in list_checkpoints(folder)}
    # The reference removes one file per save; what is older went with the saves before.
    expected = {f"step-{step:06d}" for step in before if gone is not None and step <= gone}
    assert removed == expected


@pytest.mark.parametrize("case", [case for case in GOLDEN["file_names"] if "step" in case and case["output_name"]])
def test_a_step_checkpoint_is_named_as_the_reference_names_it(case, tmp_path):
    folder = RunFolder(tmp_path, case["output_name"])
    assert folder.checkpoint_file(case["step"]).name == case["expected"]


def test_the_final_file_has_the_plain_name(tmp_path):
    [case] = [case for case in GOLDEN["file_names"] if case.get("last") and case["output_name"]]
    assert RunFolder(tmp_path, case["output_name"]).final.name == case["expected"]


NOT_OURS = [
    "file_names without an output_name: the run folder's name is always there",
    "file_names by epoch: checkpoints are named by step",
    "state_dir_names: the state lies beside the adapter in one checkpoint folder",
]


def test_the_running_loss_is_the_mean_of_the_last_epoch():
    average = LossAverage()
    for _, index, loss, expected in GOLDEN["loss_average"]["rows"]:
        assert average.add(index, loss) == pytest.approx(expected, rel=1e-12)


def test_a_running_loss_goes_on_after_a_resume():
    whole, first = LossAverage(), LossAverage()
    for index, loss in enumerate((3.0, 1.0, 2.0)):
        whole.add(index, loss)
        first.add(index, loss)
    resumed = LossAverage(first.values)
    assert resumed.add(0, 5.0) == whole.add(0, 5.0)
