"""The search for what fits: lossless ways first, as fast as possible, and an honest no."""

from __future__ import annotations

from typing import Any

from tests.core.plan.plans import prepared
from tuner.core.plan.devices import ANY_GPU, Device, device_named
from tuner.core.plan.plan import predict
from tuner.core.plan.search import Choice, changed_config, fit


def choice(model: str, size: float, device: Device | None = None, **sections: Any) -> Choice:
    return fit(*prepared(model, **sections), device or device_named("4090"), size * 1e9)


def test_nothing_changes_where_everything_fits():
    found = choice("anima", 80)
    assert found.fits and found.best.changes == () and found.why == {}


def test_exact_ways_come_before_quantized_weights():
    found = choice("flux", 12)
    assert found.fits and found.best.lossless
    assert {"memory.checkpointing", "memory.swap_blocks"} <= dict(found.best.changes).keys()
    assert not choice("flux", 6).best.lossless


def test_the_keys_that_are_named_give_the_plan_that_was_promised():
    config, facts, work = prepared("sd35-large")
    found = fit(config, facts, work, device_named("4090"), 12e9)
    again = predict(changed_config(config, dict(found.best.changes)), facts, work, device_named("4090"))
    assert again.needed() == found.best.plan.needed() <= 12e9


def test_nothing_fits_into_too_little_and_the_nearest_miss_is_named():
    found = choice("flux", 3)
    assert not found.fits and found.best.plan.needed() > 3e9
    assert found.best.plan.needed() < found.as_is.plan.needed()


def test_captions_must_fit_too():
    found = choice("sd35-medium", 8)
    assert dict(found.best.changes)["quantize.text_encoder.t5"] == "int8"
    assert any("captions are encoded a little differently" in line for line in found.why.values())


def test_an_update_keeps_its_samples_when_micro_batches_shrink():
    found = choice("anima", 6, train={"batch_size": 8, "accumulate": 2})
    chosen = dict(found.best.changes)
    size, accumulate = chosen.get("train.batch_size", 8), chosen.get("train.accumulate", 2)
    assert found.fits and size < 8 and size * accumulate == 16


def test_sets_that_name_their_batches_keep_them():
    raw = {"data": {"sets": [{"resolution": 1024, "batch_size": 8, "sources": [{"id": "a", "path": "/nowhere/a"}]}]}}
    assert "train.batch_size" not in dict(choice("anima", 8, **raw).best.changes)


def test_ways_are_compared_on_a_device_without_known_rates_too():
    found = choice("anima", 8, ANY_GPU)
    assert found.best.changes == choice("anima", 8).best.changes and found.best.plan.seconds is None


def test_full_fine_tuning_takes_blocks_to_the_host_and_at_last_all_of_its_state():
    config, facts, work = prepared("anima")
    full = changed_config(config, {"train.mode": "full", "optimizer.name": "adamw8bit", "optimizer.fuse": "block"})
    found = fit(full, facts, work, device_named("4090"), 6e9)
    assert found.fits and dict(found.best.changes)["memory.swap_blocks"] > 0
    assert not {"optimizer.offload", "quantize.denoiser"} & dict(found.best.changes).keys()
    found = fit(full, facts, work, device_named("4090"), 4e9)
    assert found.fits and dict(found.best.changes)["optimizer.offload"] is True
    whole = changed_config(full, {"optimizer.name": "prodigy", "optimizer.fuse": "off"})
    assert (
        not {"memory.swap_blocks", "optimizer.offload"}
        & dict(fit(whole, facts, work, device_named("4090"), 6e9).best.changes).keys()
    )


def test_every_lever_says_what_it_saves_and_costs():
    found = choice("flux", 8)
    assert len(found.why) == len(found.best.changes)
    assert all("less" in line and ("slower" in line or "as fast" in line) for line in found.why.values())


def test_compiled_blocks_get_levels_that_go_with_them():
    found = choice("anima", 8, compile={"enabled": True})
    assert found.fits and dict(found.best.changes).get("memory.checkpointing") in (None, "block")
