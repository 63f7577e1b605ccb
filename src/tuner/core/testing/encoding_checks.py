"""Checks of text, latents, noise and prediction, all without an adapter."""

from __future__ import annotations

from typing import ClassVar

import torch

from tuner.core.data.text_cache import cached_fields, join_text, split_text
from tuner.core.rng import Rng
from tuner.core.testing.bench import CAPTIONS, Bench, assert_near
from tuner.core.types import Batch, TextEmbeds


class EncodingChecks:
    """What goes into a step, and the denoiser's answer."""

    round_trip: ClassVar[float | None]

    # --- text ---------------------------------------------------------------------------------------------------------

    def test_text_fields_are_as_declared(self, bench: Bench) -> None:
        """Names, dtypes and shapes, with the captions that users have: short, empty and long."""
        facts, config = bench.run.facts, bench.run.config
        fields = cached_fields(config, facts)
        found = bench.text(CAPTIONS).tensors
        assert set(found) == set(fields)
        for name, field in fields.items():
            tensor = found[name]
            sizes = [None if isinstance(size, str) else size for size in field.shape]
            assert tensor.shape[0] == len(CAPTIONS), name
            assert [None if want is None else got for want, got in zip(sizes, tensor.shape[1:], strict=True)] == sizes
            if field.dtype in ("bool", "int64"):
                assert str(tensor.dtype) == f"torch.{field.dtype}", name
            else:
                assert tensor.is_floating_point() and bool(torch.isfinite(tensor).all()), name

    def test_what_a_mask_cuts_off_is_exactly_the_padding(self, bench: Bench) -> None:
        """The cache drops those rows and puts ``pad`` back."""
        fields = cached_fields(bench.run.config, bench.run.facts)
        found = bench.text(CAPTIONS).tensors
        for name, field in fields.items():
            if field.trim is not None and field.trim != name:
                cut = found[name].movedim(1 + field.shape.index("L"), 1)[~found[field.trim]]
                assert bool((cut == field.pad).all()), name

    def test_the_empty_caption_encodes_alone(self, bench: Bench) -> None:
        assert bench.text([""]).tensors.keys() == bench.text(CAPTIONS).tensors.keys()

    def test_text_from_the_cache_acts_as_live_text(self, bench: Bench) -> None:
        fields = cached_fields(bench.run.config, bench.run.facts)
        live = bench.batch()
        captions = [item.caption for item in live.items]
        rows = [row for caption in captions for row in split_text(bench.text([caption]), fields)]
        stored = with_text(live, join_text(rows, fields))
        expected = bench.predict(bench.run, bench.models, live)
        assert_near(bench.predict(bench.run, bench.models, stored), expected)

    # --- latents ------------------------------------------------------------------------------------------------------

    def test_pixels_go_to_latents_and_back(self, bench: Bench) -> None:
        facts = bench.facts
        for height, width in bench.sizes:
            latents = bench.latents(2, (height, width))
            grid = (height // facts.spatial_factor, width // facts.spatial_factor)
            assert latents.shape == (2, facts.latent_channels, *grid)
            assert latents.dtype == torch.float32 and bool(torch.isfinite(latents).all())
            with torch.no_grad():
                pixels = bench.run.model.decode_latents(bench.models, latents)
            assert pixels.shape == (2, 3, height, width) and pixels.dtype == torch.float32
            assert bool(torch.isfinite(pixels).all())
            if self.round_trip is not None:
                assert float((pixels - bench.pixels(2, (height, width))).abs().max()) <= self.round_trip

    def test_a_picture_encodes_the_same_alone_and_in_a_batch(self, bench: Bench) -> None:
        pixels = bench.pixels(2, bench.sizes[0])
        with torch.no_grad():
            alone = [bench.run.model.encode_latents(bench.models, each[None]) for each in pixels]
            assert_near(bench.run.model.encode_latents(bench.models, pixels), torch.cat(alone))

    # --- noise and prediction -----------------------------------------------------------------------------------------

    def test_noise_starts_at_the_picture_and_ends_at_noise(self, bench: Bench) -> None:
        """The canonical direction: target is noise minus latents, and sigma 1 is pure noise."""
        latents = bench.latents(2, bench.sizes[0])
        noise = Rng(1, "limits").normal(latents.shape)
        at = bench.run.model.noise_target
        none, full = (at(latents, noise, torch.full((2,), sigma)) for sigma in (0.0, 1.0))
        torch.testing.assert_close(none.noisy, latents)
        torch.testing.assert_close(full.noisy, noise)
        half = at(latents, noise, torch.tensor([0.25, 0.75]))
        torch.testing.assert_close(half.target, noise - latents)
        assert bool((half.timesteps[1] > half.timesteps[0]).all())
        for each in (none, half, full):
            assert bool(torch.isfinite(each.weight).all()) and bool((each.weight >= 0).all())

    def test_prediction_has_the_shape_of_its_input(self, bench: Bench) -> None:
        for size in bench.sizes:
            for count in (1, 2):
                latents = bench.latents(count, size)
                batch = Batch(
                    latents=latents,
                    text=bench.text(CAPTIONS[:count]),
                    loss_mask=None,
                    loss_weight=torch.ones(count),
                    items=(),
                )
                velocity = bench.predict(bench.run, bench.models, batch)
                assert velocity.shape == latents.shape and bool(torch.isfinite(velocity).all())

    def test_embedded_guidance_acts_exactly_where_it_is_declared(self, bench: Bench) -> None:
        batch, run = bench.batch(), bench.run
        with torch.no_grad():
            noisy = run.model.noise_target(batch.latents, Rng(4).normal(batch.latents.shape), torch.tensor([0.5, 0.7]))
            low, high = (
                run.model.predict(bench.models, noisy.noisy, noisy.timesteps, batch.text, torch.full((2,), value))
                for value in (1.0, 6.0)
            )
        assert torch.equal(low, high) != bench.facts.guidance_input

    def test_padding_can_be_masked_as_declared(self, bench: Bench) -> None:
        """Masks keep the rest of the encoding in place: fields, shapes and a finite prediction."""
        for name in bench.facts.padding_masks:
            run = bench.open(text_encoder={"mask_padding": {name: True}})
            batch = bench.batch(run=run)
            assert bench.predict(run, bench.models, batch).isfinite().all(), name

    def test_samples_of_a_batch_do_not_see_each_other(self, bench: Bench) -> None:
        batch = bench.batch()
        together = bench.run.model.predict
        sigmas = torch.tensor([0.3, 0.8])
        with torch.no_grad():
            target = bench.run.model.noise_target(batch.latents, Rng(2).normal(batch.latents.shape), sigmas)
            joint = together(bench.models, target.noisy, target.timesteps, batch.text)
            alone = [
                together(bench.models, target.noisy[i : i + 1], target.timesteps[i : i + 1], rows(batch.text, i))
                for i in range(2)
            ]
        assert_near(joint, torch.cat(alone))


def with_text(batch: Batch, text: TextEmbeds) -> Batch:
    """The batch with other encoded captions, and without a mask."""
    return Batch(latents=batch.latents, text=text, loss_mask=None, loss_weight=batch.loss_weight, items=batch.items)


def rows(text: TextEmbeds, index: int) -> TextEmbeds:
    """One sample of encoded captions."""
    return TextEmbeds(tensors={name: tensor[index : index + 1] for name, tensor in text.tensors.items()})
