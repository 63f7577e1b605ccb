"""Batches depend on the plan, the seed and the place in the run, and on nothing else."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.data.toy import Rig, one_set, open_rig, source, word_vector, write_image, write_images
from tuner.core.data.cache import CacheStore
from tuner.core.data.ledger import Ledger, changes_since
from tuner.core.data.loader import BatchLoader
from tuner.core.errors import UsageError
from tuner.core.types import Batch

SIZES = [(32, 32), (48, 24), (32, 32), (40, 30), (32, 32)]
LIVELY = {
    "augment": {"flip": True},
    "captions": {"shuffle": True, "keep_first": 1, "dropout": 0.3},
    "repeats": 3,
}


def loader_of(tmp_path: Path, settings: dict[str, Any] | None = None, **sections: Any) -> tuple[Rig, BatchLoader]:
    folder = tmp_path / "images"
    if not folder.exists():
        write_images(folder, SIZES)
    geometry = sections.pop("geometry", {})
    rig = open_rig(tmp_path, one_set(source("a", folder, **(settings or {})), **geometry), **sections)
    rig.fill()
    return rig, rig.caches.loader()


def seen(batches: Any) -> list[tuple]:
    """Everything that a batch holds, comparable."""
    return [
        (batch.items, batch.latents.tolist(), {name: each.tolist() for name, each in batch.text.tensors.items()})
        for batch in batches
    ]


def workers(count: int, prefetch: int = 2) -> dict[str, Any]:
    return {"workers": {"scan": 0, "cache": 0, "load": count}, "prefetch": prefetch}


def test_the_sequence_is_the_same_whatever_the_number_of_workers(tmp_path: Path):
    _, base = loader_of(tmp_path, LIVELY, data=workers(0))
    expected = [seen(base.batches(epoch)) for epoch in range(2)]
    assert expected[0] != expected[1]
    for count, prefetch in ((1, 1), (4, 3), (2, 0)):
        _, loader = loader_of(tmp_path, LIVELY, data=workers(count, prefetch))
        assert [seen(loader.batches(epoch)) for epoch in range(2)] == expected


@pytest.mark.parametrize("cache", ["disk", "off"])
def test_a_run_that_stops_anywhere_goes_on_with_the_same_batches(tmp_path: Path, cache):
    settings = {**LIVELY, "captions": {**LIVELY["captions"], "tag_warmup": {"from": 0, "steps": 6}}}
    sections = {"train": {"steps": 9, "accumulate": 2}, "cache": {"latents": cache, "text": "off"}}
    _, loader = loader_of(tmp_path, settings, **sections)
    whole = [seen(loader.batches(epoch)) for epoch in range(2)]
    for epoch in range(2):
        for start in range(0, len(whole[epoch]), 2):
            _, again = loader_of(tmp_path, settings, **sections)
            assert seen(again.batches(epoch, start)) == whole[epoch][start:]


def test_a_run_without_caches_draws_crops_and_colours_by_visit(tmp_path: Path):
    settings = {"augment": {"flip": True, "color": True}, "repeats": 4}
    sections = {"geometry": {"crop": {"style": "random"}}, "cache": {"latents": "off"}}
    _, loader = loader_of(tmp_path, settings, **sections, data=workers(0))
    _, threaded = loader_of(tmp_path, settings, **sections, data=workers(3))
    assert seen(loader.batches(0)) == seen(threaded.batches(0))
    looks = {
        tuple(latents.flatten().tolist())
        for batch in loader.batches(0)
        for item, latents in zip(batch.items, batch.latents, strict=True)
        if item.id.startswith("01.png")
    }
    assert len(looks) == 4


def test_another_seed_draws_other_batches(tmp_path: Path):
    _, one = loader_of(tmp_path, LIVELY | {"captions": {}}, train={"steps": 1, "seed": 1})
    _, two = loader_of(tmp_path, LIVELY | {"captions": {}}, train={"steps": 1, "seed": 2})
    assert seen(one.batches(0)) != seen(two.batches(0))


def test_batches_have_the_promised_shapes_and_dtypes(tmp_path: Path):
    _, loader = loader_of(tmp_path)
    batches = list(loader.batches(0))
    assert Counter(len(batch.items) for batch in batches) == {2: 2, 1: 1}
    for batch in batches:
        count = len(batch.items)
        assert (batch.latents.dtype, batch.latents.shape[:2]) == (torch.float32, (count, 3))
        assert batch.loss_weight.tolist() == [1.0] * count
        assert batch.loss_mask is None
        assert {name: each.shape[0] for name, each in batch.text.tensors.items()} == {
            "context": count,
            "mask": count,
            "pooled": count,
        }
        assert {item.source for item in batch.items} == {"a"}


def test_the_text_belongs_to_the_caption_of_the_item(tmp_path: Path):
    _, loader = loader_of(tmp_path, {"captions": {"wildcards": True, "prefix": "{red|blue}"}, "repeats": 5})
    prefixes = Counter()
    for batch in loader.batches(0):
        for row, item in enumerate(batch.items):
            first = item.caption.split()[0]
            prefixes[first] += 1
            assert torch.equal(batch.text.tensors["context"][row, 0], word_vector(first))
    assert set(prefixes) == {"red", "blue"}


def test_a_dropped_caption_gets_the_encoding_of_the_empty_text_and_the_cache_stays_as_it_is(tmp_path: Path):
    _, loader = loader_of(tmp_path, {"captions": {"dropout": 1.0}})
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    for batch in loader.batches(0):
        assert {item.caption for item in batch.items} == {""}
        assert not batch.text.tensors["mask"].any()
        batch.text.tensors["context"].fill_(5.0)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")} == before
    assert not next(loader.batches(1)).text.tensors["context"].any()


def test_dropout_every_n_epochs_counts_epochs_from_one(tmp_path: Path):
    _, loader = loader_of(tmp_path, {"captions": {"dropout_every_n_epochs": 2}})
    captions = [{item.caption == "" for batch in loader.batches(epoch) for item in batch.items} for epoch in range(4)]
    assert captions == [{False}, {True}, {False}, {True}]


def test_the_tag_warmup_follows_the_updates(tmp_path: Path):
    warmup = {"captions": {"tag_warmup": {"from": 0, "steps": 3}}}
    _, loader = loader_of(tmp_path, warmup, train={"steps": 6, "accumulate": 1}, cache={"text": "off"})
    tags = [len(item.caption.split(", ")) for batch in loader.batches(0) for item in batch.items if item.caption]
    assert sorted(tags) == tags
    assert {len(item.caption.split(", ")) for batch in loader.batches(1) for item in batch.items} == {3}
    later = loader.batches(0, start=0, step=3)
    assert {len(item.caption.split(", ")) for batch in later for item in batch.items} == {3}


def test_without_cached_text_the_batch_carries_final_captions_only(tmp_path: Path):
    _, loader = loader_of(tmp_path, LIVELY, cache={"text": "off"})
    batch = next(loader.batches(0))
    assert batch.text.tensors == {}
    assert len({item.caption for batch in loader.batches(0) for item in batch.items}) > 3


def test_both_orientations_occur(tmp_path: Path):
    _, loader = loader_of(tmp_path, {"augment": {"flip": True}, "repeats": 8})
    looks = Counter(
        tuple(latents.flatten().tolist())
        for batch in loader.batches(0)
        for item, latents in zip(batch.items, batch.latents, strict=True)
        if item.id.startswith("00.png")
    )
    assert len(looks) == 2


def test_regularisation_weighs_less_and_images_without_a_mask_train_everywhere(tmp_path: Path):
    masks = write_images(tmp_path / "masks", SIZES[:1], mode="L")
    plain = write_images(tmp_path / "images", SIZES[:1])
    sets = one_set(
        source("a", plain, mask={"path": str(masks)}),
        source("reg", write_images(tmp_path / "reg", SIZES[:1], mode="L"), role="regularisation"),
    )
    rig = open_rig(tmp_path, sets, data={"regularisation_weight": 0.5})
    rig.fill()
    [batch] = list(rig.caches.loader().batches(0))
    rows = {item.source: index for index, item in enumerate(batch.items)}
    assert batch.loss_weight[rows["reg"]] == 0.5
    assert batch.loss_mask is not None
    assert batch.loss_mask.shape == (2, 1, 4, 4)
    assert bool((batch.loss_mask[rows["reg"]] == 1).all())
    assert not bool((batch.loss_mask[rows["a"]] == 1).all())


def test_validation_batches_are_plain_and_always_the_same(tmp_path: Path):
    folder = write_images(tmp_path / "images", SIZES)
    held = source(
        "v", folder, role="validation", **{**LIVELY, "captions": {"shuffle": True, "variants": 3, "dropout": 1}}
    )
    rig = open_rig(tmp_path, one_set(source("a", folder), held))
    rig.fill()
    loader = rig.caches.loader()
    first = list(loader.validation_batches())
    assert seen(first) == seen(loader.validation_batches())
    captions = {item.caption for batch in first for item in batch.items}
    assert captions == {f"tag{number:02}, red, big" for number in range(5)}
    assert sum(len(batch.items) for batch in first) == 5
    plain = {item.id: row for batch in loader.batches(0) for item, row in zip(batch.items, batch.latents, strict=True)}
    for batch in first:
        for item, row in zip(batch.items, batch.latents, strict=True):
            assert torch.equal(row, plain[item.id])


def test_an_error_in_a_thread_reaches_the_caller_with_its_reason(tmp_path: Path):
    rig, loader = loader_of(tmp_path)
    for path in (tmp_path / "cache").glob("??/??/*.safetensors"):
        path.unlink()
    rig.facade.nan = True
    with pytest.raises(UsageError, match="not finite"):
        list(loader.batches(0))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_leaving_early_stops_the_threads(tmp_path: Path):
    _, loader = loader_of(tmp_path, LIVELY | {"captions": {}})
    stream = loader.batches(0)
    assert isinstance(next(stream), Batch)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_entry_that_breaks_during_the_run_is_made_again(tmp_path: Path, caplog):
    _, loader = loader_of(tmp_path, {"captions": {"fixed": "", "from": "fixed"}})
    expected = seen(loader.batches(0))
    store = CacheStore(tmp_path / "cache")
    for name in list(store.names()):
        store.path(name).write_bytes(store.path(name).read_bytes()[:-1])
    assert seen(loader.batches(0)) == expected
    assert "is broken" in caplog.text
    assert list(store.broken()) == []


# --- ledger -----------------------------------------------------------------------------------------------------------


def test_the_ledger_tells_what_became_of_every_image(tmp_path: Path):
    settings = {"repeats": 2, "filters": {"max_aspect": 1.5}}
    rig, loader = loader_of(tmp_path, settings, validate={"split": 0.3, "seed": 1})
    ledger = Ledger(rig.plan)
    for batch in loader.batches(0):
        ledger.add(batch.items)
    ledger.write(tmp_path / "data.json")
    told = ledger.as_dict()
    assert {row["image"]: row["used"] for row in told["images"] if row["part"] == "train"} == {
        item.record.key: 2 for item in rig.plan.items
    }
    assert {row["used"] for row in told["images"] if row["part"] == "validation"} == {0}
    assert told["left_out"] == [
        {"source": "a", "image": "01.png", "resolution": None, "reason": "48x24 is wider than filters.max_aspect 1.5"}
    ]
    row = next(row for row in told["images"] if row["image"] == "00.png")
    assert (row["size"], row["resized"], row["bucket"], row["cropped_percent"]) == ([32, 32], [32, 32], [32, 32], 0.0)


def test_the_ledger_goes_on_counting_after_a_resume(tmp_path: Path):
    rig, loader = loader_of(tmp_path)
    ledger = Ledger(rig.plan)
    for batch in loader.batches(0):
        ledger.add(batch.items)
    ledger.write(tmp_path / "data.json")
    resumed = Ledger(rig.plan)
    resumed.load(ledger.state())
    for batch in loader.batches(1):
        resumed.add(batch.items)
    assert {row["used"] for row in resumed.as_dict()["images"]} == {2}


def test_a_ledger_tells_what_changed_in_the_data_since_it_was_written(tmp_path: Path):
    rig, _ = loader_of(tmp_path)
    path = tmp_path / "data.json"
    assert changes_since(path, rig.plan) == []
    Ledger(rig.plan).write(path)
    assert changes_since(path, rig.plan) == []
    images = tmp_path / "images"
    write_image(images / "00.png", SIZES[0], seed=30)
    (images / "01.txt").write_text("another")
    (images / "02.png").rename(images / "05.png")
    (images / "02.txt").rename(images / "05.txt")
    changed, _ = loader_of(tmp_path)
    assert changes_since(path, changed.plan) == [
        "1 image new: a/05.png",
        "1 image gone: a/02.png",
        "1 image with changed content: a/00.png",
        "1 image with a changed caption: a/01.png",
    ]
    assert changed.plan.fingerprint != rig.plan.fingerprint
