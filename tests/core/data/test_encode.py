"""Caching: what is encoded, what is encoded again after a change, and that nothing can break it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.core.data.toy import FACTOR, Rig, one_set, open_rig, source, word_vector, write_image, write_images
from tuner.core.data.cache import CacheStore
from tuner.core.data.looks import Look, fixed_looks
from tuner.core.errors import UsageError

SIZES = [(32, 32), (48, 24), (32, 32), (24, 48)]


def rig_of(tmp_path: Path, settings: dict | None = None, geometry: dict | None = None, **sections) -> Rig:
    folder = tmp_path / "images"
    if not folder.exists():
        write_images(folder, SIZES)
    return open_rig(tmp_path, one_set(source("a", folder, **(settings or {})), **(geometry or {})), **sections)


def entries(tmp_path: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (tmp_path / "cache").glob("??/??/*.safetensors")}


def test_a_second_run_encodes_nothing_and_loads_no_model(tmp_path: Path):
    first = rig_of(tmp_path)
    assert first.caches.missing() == (5, 4)
    assert first.fill() == (5, 4)
    assert first.facade.loads == [("encoder",), ("vae",)]
    second = rig_of(tmp_path)
    assert second.caches.missing() == (0, 0)
    assert second.fill() == (0, 0)
    assert second.facade.loads == []


def test_an_edited_caption_is_encoded_again_and_nothing_else(tmp_path: Path):
    rig_of(tmp_path).fill()
    (tmp_path / "images" / "01.txt").write_text("another text")
    rig = rig_of(tmp_path)
    assert rig.fill() == (1, 0)
    assert rig.facade.texts == ["another text"]


def test_an_edited_image_is_encoded_again_and_nothing_else(tmp_path: Path):
    rig_of(tmp_path).fill()
    write_image(tmp_path / "images" / "02.png", SIZES[2], seed=99)
    assert rig_of(tmp_path).fill() == (0, 1)


def test_other_vae_weights_encode_all_images_and_no_caption(tmp_path: Path):
    rig_of(tmp_path).fill()
    (tmp_path / "vae.safetensors").write_bytes(b"other")
    assert rig_of(tmp_path).fill() == (0, 4)


def test_other_encoder_weights_encode_all_captions_and_no_image(tmp_path: Path):
    rig_of(tmp_path).fill()
    (tmp_path / "encoder.safetensors").write_bytes(b"other")
    assert rig_of(tmp_path).fill() == (5, 0)


@pytest.mark.parametrize(
    ("change", "encoded"),
    [
        ({"facts": {"max_tokens": {"encoder": 8}}}, (5, 0)),
        ({"precision": {"vae": "bf16"}}, (0, 4)),
        ({"precision": {"text_encoder": {"encoder": "fp32"}}}, (5, 0)),
        ({"latents": {"posterior": "sample"}}, (0, 4)),
        ({"cache": {"dtype": "fp32"}}, (5, 4)),
        ({"geometry": {"resize": "lanczos"}}, (0, 4)),
        ({"geometry": {"resolution": [32, 16]}}, (0, 4)),
        ({"settings": {"augment": {"flip": True}}}, (0, 4)),
        ({"settings": {"captions": {"prefix": "photo of"}}}, (4, 0)),
        ({"settings": {"captions": {"dropout": 0.5}}}, (0, 0)),
        ({"settings": {"repeats": 3}}, (0, 0)),
        ({"train": {"steps": 99, "seed": 5}}, (0, 0)),
    ],
    ids=str,
)
def test_a_changed_setting_encodes_what_it_changes(tmp_path: Path, change, encoded):
    rig_of(tmp_path).fill()
    assert rig_of(tmp_path, **change).fill() == encoded


def test_another_crop_encodes_the_images_that_it_cuts_elsewhere(tmp_path: Path):
    write_images(tmp_path / "images", [(32, 32), (40, 32), (32, 32)])
    square = {"buckets": {"enabled": False}}
    rig_of(tmp_path, geometry=square).fill()
    assert rig_of(tmp_path, geometry={**square, "crop": {"style": "corner"}}).fill() == (0, 1)


def test_a_run_killed_at_any_point_goes_on_and_ends_like_an_undisturbed_one(tmp_path: Path):
    rig_of(tmp_path).fill()
    complete = entries(tmp_path)
    for alive in range(9):
        for path in (tmp_path / "cache").glob("??/??/*.safetensors"):
            path.unlink()
        killed = rig_of(tmp_path)
        killed.facade.fail_after = alive
        with pytest.raises(KeyboardInterrupt):
            killed.fill()
        again = rig_of(tmp_path)
        assert sum(again.fill()) == 9 - alive
        assert entries(tmp_path) == complete


def test_an_image_that_changes_after_the_scan_is_not_stored_under_the_old_key(tmp_path: Path):
    rig = rig_of(tmp_path)
    write_image(tmp_path / "images" / "03.png", SIZES[3], seed=77)
    with pytest.raises(UsageError, match="changed after it was indexed"):
        rig.caches.fill_latents()
    again = rig_of(tmp_path)
    again.caches.fill_latents()
    [item] = [item for item in again.plan.items if item.record.key == "03.png"]
    changed = again.caches.latents.key(item, fixed_looks(again.plan, item)[0])
    assert changed.ingredients["image"] == item.record.digest != rig.plan.items[3].record.digest
    assert len(entries(tmp_path)) == 4


def test_nothing_is_written_beside_the_images(tmp_path: Path):
    write_images(tmp_path / "images", SIZES)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*")}
    (tmp_path / "images").chmod(0o555)
    rig_of(tmp_path).fill()
    (tmp_path / "images").chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*")} == before


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_broken_entry_is_noticed_when_it_is_read_and_made_again(tmp_path: Path, caplog, damage):
    rig = rig_of(tmp_path)
    rig.fill()
    item = rig.plan.items[0]
    [look] = fixed_looks(rig.plan, item)
    key, text = rig.caches.latents.key(item, look), rig.caches.text.key("")
    good, _ = rig.caches.latents.get(item, look)
    store = CacheStore(tmp_path / "cache")
    for each in (key, text):
        path = store.path(each)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-3])
        if damage == "gone":
            path.unlink()
    again, _ = rig.caches.latents.get(item, look)
    assert torch.equal(again, good)
    assert rig.caches.text.get("")["pooled"].abs().sum() == 0
    assert ("is broken" in caplog.text) == (damage != "gone")
    assert list(store.broken()) == []
    assert store.has(key)


def test_latents_are_those_of_the_resized_and_cropped_pixels(tmp_path: Path):
    rig = rig_of(tmp_path, cache={"dtype": "fp32"})
    rig.fill()
    [item] = [item for item in rig.plan.items if item.record.key == "00.png"]
    latents, mask = rig.caches.latents.get(item, Look(False, (0, 0)))
    pixels = torch.frombuffer(bytearray(Image.open(item.record.path).tobytes()), dtype=torch.uint8)
    expected = pixels.reshape(32, 32, 3).permute(2, 0, 1)[:, ::FACTOR, ::FACTOR].float() / 127.5 - 1
    assert torch.allclose(latents, expected, atol=1e-6)
    assert mask is None


def test_both_orientations_are_cached_when_images_are_flipped(tmp_path: Path):
    rig = rig_of(tmp_path, {"augment": {"flip": True}}, cache={"dtype": "fp32"})
    assert rig.fill() == (5, 8)
    for item in rig.plan.items:
        plain, mirrored = fixed_looks(rig.plan, item)
        pixels = rig.caches.latents._job(item, mirrored)
        assert pixels.look.flip
        assert not torch.equal(rig.caches.latents.get(item, plain)[0], rig.caches.latents.get(item, mirrored)[0])


def test_forwards_hold_one_size_and_at_most_the_batch_size(tmp_path: Path):
    write_images(tmp_path / "images", [(32, 32)] * 5 + [(48, 24)] * 2)
    rig = rig_of(tmp_path, cache={"vae_batch_size": 3})
    rig.fill()
    assert sorted(rig.facade.forwards) == sorted([(3, 3, 32, 32), (2, 3, 32, 32), (2, 3, 24, 40)])


def test_progress_counts_what_was_missing(tmp_path: Path):
    rig = rig_of(tmp_path, cache={"vae_batch_size": 2, "text_batch_size": 3})
    seen: list[tuple[int, int]] = []
    rig.fill_text(lambda done, total: seen.append((done, total)))
    assert seen == [(3, 5), (5, 5)]
    seen.clear()
    rig.caches.fill_latents(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)


def test_worker_processes_make_the_same_entries(tmp_path: Path):
    write_images(tmp_path / "images", [(32, 32), (48, 24)] * 8)
    rig_of(tmp_path).fill()
    alone = entries(tmp_path)
    for path in (tmp_path / "cache").glob("??/??/*.safetensors"):
        path.unlink()
    rig_of(tmp_path, data={"workers": {"scan": 0, "cache": 2}}).fill()
    assert entries(tmp_path) == alone


def test_a_posterior_sample_belongs_to_the_image_and_not_to_its_batch(tmp_path: Path):
    sample = {"latents": {"posterior": "sample"}}
    rig_of(tmp_path, **sample).fill()
    alone = entries(tmp_path)
    for path in (tmp_path / "cache").glob("??/??/*.safetensors"):
        path.unlink()
    rig_of(tmp_path, **sample, cache={"vae_batch_size": 4}).fill()
    assert entries(tmp_path) == alone


def test_latents_that_are_not_finite_are_refused_with_the_name_of_the_image(tmp_path: Path):
    rig = rig_of(tmp_path)
    rig.facade.nan = True
    with pytest.raises(UsageError, match="not finite") as caught:
        rig.caches.fill_latents()
    assert "a/0" in str(caught.value)
    assert len(entries(tmp_path)) == 0


@pytest.mark.parametrize(
    ("settings", "geometry"), [({"augment": {"color": True}}, {}), ({}, {"crop": {"style": "random"}})]
)
def test_looks_that_change_at_every_visit_are_refused_with_the_way_out(tmp_path: Path, settings, geometry):
    with pytest.raises(UsageError, match="cannot be cached") as caught:
        rig_of(tmp_path, settings, geometry)
    assert 'cache.latents to "off"' in str(caught.value)


def test_without_a_cache_nothing_is_written_and_looks_may_change(tmp_path: Path):
    rig = rig_of(tmp_path, {"augment": {"color": True}}, cache={"latents": "off", "text": "off"})
    assert rig.caches.missing() == (0, 0)
    assert rig.fill() == (0, 0)
    latents, _ = rig.caches.latents.get(rig.plan.items[0], Look(True, (0, 0)))
    assert latents.dtype == torch.float32
    assert rig.facade.loads == [("vae",)]
    assert entries(tmp_path) == {}


def test_a_cache_in_memory_leaves_no_files(tmp_path: Path):
    rig = rig_of(tmp_path, cache={"latents": "memory", "text": "memory"})
    assert rig.fill() == (5, 4)
    assert rig.fill() == (0, 0)
    assert entries(tmp_path) == {}


def test_pruning_keeps_what_the_run_reads(tmp_path: Path):
    rig_of(tmp_path, {"captions": {"prefix": "old"}}, geometry={"resize": "bicubic"}).fill()
    rig = rig_of(tmp_path)
    rig.fill()
    store = CacheStore(tmp_path / "cache")
    assert len(store.prune(rig.caches.keys())) == 8
    assert rig.caches.missing() == (0, 0)
    assert set(store.names()) == rig.caches.keys()


def test_ranks_share_the_work_without_meeting(tmp_path: Path):
    rigs = [rig_of(tmp_path) for _ in range(2)]
    counts = [rig.caches.latents.fill(rank=rank, ranks=2) for rank, rig in enumerate(rigs)]
    assert sum(counts) == 4
    assert sum(len(rig.facade.forwards) for rig in rigs) == 4


# --- masks ------------------------------------------------------------------------------------------------------------


def test_an_alpha_channel_becomes_a_mask_of_latent_size(tmp_path: Path):
    folder = tmp_path / "images"
    write_images(folder, [(32, 32)])
    alpha = Image.new("L", (32, 32), 0)
    alpha.paste(255, (0, 0, 16, 32))
    alpha.paste(51, (16, 0, 24, 8))
    image = Image.open(folder / "00.png")
    image.putalpha(alpha)
    image.save(folder / "00.png")
    rig = rig_of(tmp_path, {"mask": "alpha", "augment": {"flip": True}})
    rig.fill()
    item = rig.plan.items[0]
    plain, mirrored = (rig.caches.latents.get(item, look)[1] for look in fixed_looks(rig.plan, item))
    expected = torch.tensor([[1.0, 1.0, 0.2, 0.0], *[[1.0, 1.0, 0.0, 0.0]] * 3])
    assert torch.allclose(plain, expected[None], atol=1e-6)
    assert torch.equal(mirrored, plain.flip(-1))


def test_masks_from_a_folder_are_part_of_the_key(tmp_path: Path):
    write_images(tmp_path / "images", [(32, 32)] * 2)
    masks = tmp_path / "masks"
    write_images(masks, [(32, 32)] * 2, mode="L")
    settings = {"mask": {"path": str(masks)}}
    rig = rig_of(tmp_path, settings)
    rig.fill()
    first = rig.caches.latents.get(rig.plan.items[0], Look(False, (0, 0)))
    write_image(masks / "00.png", (32, 32), seed=50, mode="L")
    again = rig_of(tmp_path, settings)
    assert again.fill() == (0, 1)
    second = again.caches.latents.get(again.plan.items[0], Look(False, (0, 0)))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


# --- text -------------------------------------------------------------------------------------------------------------


def test_equal_captions_are_encoded_once_and_short_ones_first(tmp_path: Path):
    write_images(tmp_path / "images", SIZES)
    for number, text in enumerate(["a long caption with words", "cat", "cat", "a dog"]):
        (tmp_path / "images" / f"{number:02}.txt").write_text(text)
    rig = rig_of(tmp_path)
    rig.fill()
    assert rig.facade.texts == ["", "cat", "a dog", "a long caption with words"]


def test_padding_is_not_stored_and_comes_back_in_a_batch(tmp_path: Path):
    rig = rig_of(tmp_path)
    text = rig.caches.text
    text.fill(["cat", "one two three four five six seven"])
    assert text.get("cat")["context"].shape == (1, 4)
    embeds = text.collate(["cat", ""]).tensors
    assert embeds["context"].shape == (2, 6, 4)
    assert embeds["mask"].sum(1).tolist() == [1, 0]
    assert embeds["context"].dtype == torch.float32
    assert torch.equal(embeds["context"][0, 0], word_vector("cat"))
    assert embeds["context"][0, 1:].abs().sum() == 0
    long = text.collate(["cat", "one two three four five six seven"]).tensors
    assert long["context"].shape == (2, 7, 4)
    assert long["mask"].sum(1).tolist() == [1, 7]


def test_encoding_in_batches_gives_the_same_entries(tmp_path: Path):
    rig_of(tmp_path).fill_text()
    alone = entries(tmp_path)
    for path in (tmp_path / "cache").glob("??/??/*.safetensors"):
        path.unlink()
    rig_of(tmp_path, cache={"text_batch_size": 4}).fill_text()
    assert entries(tmp_path) == alone


def test_captions_that_can_become_too_many_texts_are_refused_with_the_way_out(tmp_path: Path):
    write_images(tmp_path / "images", SIZES)
    (tmp_path / "images" / "03.txt").write_text(", ".join(map(str, range(9))))
    with pytest.raises(UsageError, match="source a") as caught:
        rig_of(tmp_path, {"captions": {"shuffle": True}})
    assert "captions.variants" in str(caught.value)
    assert 'cache.text to "off"' in str(caught.value)
    rig_of(tmp_path, {"captions": {"shuffle": True}}, cache={"text": "off"})
    assert rig_of(tmp_path, {"captions": {"shuffle": True, "variants": 2}}).fill()[0] > 5


def test_fields_of_an_encoder_that_trains_are_not_cached(tmp_path: Path):
    rig = rig_of(tmp_path, train={"steps": 1, "components": ["encoder"]})
    assert rig.caches.text is None
    assert rig.fill() == (0, 4)


def test_a_model_that_does_not_say_what_it_is_made_of_cannot_be_cached(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot be cached"):
        rig_of(tmp_path, facts={"files": {}})
