"""Noise, targets and latents against the formulas, written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

import tiny
from bksdm_tune.diffusion import (
    Noising,
    embed,
    latent_moments,
    sample_latents,
    to_pixels,
    tokenise,
    training_scheduler,
)
from bksdm_tune.errors import DataError

# Stable Diffusion's schedule: betas linear in their square root, 1000 steps.
ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def noising(prediction_type: str = "epsilon", offset_noise: float = 0.0) -> Noising:
    config = dict(tiny.make_scheduler(prediction_type).config)
    return Noising(training_scheduler(config), offset_noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_latents_and_target(prediction_type: str) -> None:
    latents = torch.randn(16, 4, 8, 8)
    torch.manual_seed(5)
    noisy, timesteps, target = noising(prediction_type)(latents)
    torch.manual_seed(5)
    noise = torch.randn(16, 4, 8, 8).double().numpy()
    a = ALPHA_BAR[timesteps.numpy()].reshape(-1, 1, 1, 1)
    clean = latents.double().numpy()
    velocity = np.sqrt(a) * noise - np.sqrt(1 - a) * clean
    expected = noise if prediction_type == "epsilon" else velocity
    np.testing.assert_allclose(noisy, np.sqrt(a) * clean + np.sqrt(1 - a) * noise, atol=2e-5)
    np.testing.assert_allclose(target, expected, atol=2e-5)


def test_timesteps_are_uniform_over_all_thousand() -> None:
    torch.manual_seed(0)
    _, timesteps, _ = noising()(torch.zeros(40_000, 1, 1, 1))
    counts = torch.bincount(timesteps, minlength=1000)
    assert counts.shape == (1000,) and counts.min() > 10 and counts.max() < 80


def test_offset_noise_shifts_whole_channels() -> None:
    torch.manual_seed(1)
    _, _, plain = noising()(torch.zeros(3, 4, 8, 8))
    torch.manual_seed(1)
    _, _, shifted = noising(offset_noise=0.5)(torch.zeros(3, 4, 8, 8))
    shift = shifted - plain
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    assert shift.std() > 0.1 and len(shift[:, :, 0, 0].unique()) == 12


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type: str, gamma: float) -> None:
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    below = snr if prediction_type == "epsilon" else snr + 1
    weights = noising(prediction_type).min_snr_weights(torch.arange(1000), gamma)
    assert weights.shape == (1000,) and weights.dtype == torch.float32
    np.testing.assert_allclose(weights, np.minimum(snr, gamma) / below, rtol=2e-4)


@pytest.mark.parametrize("prediction_type", ["sample", "flow_prediction"])
def test_another_target_is_refused(prediction_type: str) -> None:
    with pytest.raises(DataError, match="epsilon and v_prediction"):
        training_scheduler({"prediction_type": prediction_type})


def test_any_sampler_config_gives_its_noise_schedule() -> None:
    scheduler = training_scheduler(dict(tiny.make_scheduler("v_prediction").config))
    assert isinstance(scheduler, DDPMScheduler)
    np.testing.assert_allclose(scheduler.alphas_cumprod, ALPHA_BAR, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (40, 100), (33, 65), (31, 32), (512, 9)])
def test_pixels_have_one_shape_and_range(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    pixels = to_pixels(Image.fromarray(noise), 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.2 and 0.2 < pixels.max() <= 1


def test_pixels_keep_values_and_the_middle() -> None:
    """A wide picture, red left of the middle third, green in it, blue right of it."""
    bands = np.zeros((32, 96, 3), np.uint8)
    for band in range(3):
        bands[:, 32 * band : 32 * (band + 1), band] = 255
    pixels = to_pixels(Image.fromarray(bands), 32)
    expected = torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 32, 32)
    assert torch.equal(pixels, expected)


def test_moments_are_those_of_the_vae_whatever_the_batch() -> None:
    vae = tiny.make_vae()
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    moments = latent_moments(vae, pixels)
    assert moments.shape == (3, 2, 4, 8, 8) and moments.dtype == torch.float32
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(moments[:, 0], posterior.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments[:, 1], posterior.std, atol=1e-5, rtol=1e-4)
    assert torch.equal(latent_moments(vae, pixels[1:2])[0], moments[1])


def test_latents_are_drawn_and_scaled() -> None:
    moments = torch.stack([torch.full((1, 4, 50, 50), 3.0), torch.full((1, 4, 50, 50), 0.5)], 1)
    torch.manual_seed(0)
    latents = sample_latents(moments, 0.2)
    assert latents.shape == (1, 4, 50, 50)
    assert latents.mean().item() == pytest.approx(0.2 * 3, abs=0.01)
    assert latents.std().item() == pytest.approx(0.2 * 0.5, rel=0.03)


def test_latents_from_moments_can_train() -> None:
    """Moments come out of inference mode, whose tensors autograd refuses to save."""
    moments = latent_moments(tiny.make_vae(), torch.zeros(1, 3, 32, 32))
    weight = torch.ones(4, requires_grad=True)
    (sample_latents(moments, 0.3) * weight[:, None, None]).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_prompts_are_embedded_as_the_pipeline_does() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=tiny.make_vae(),
        text_encoder=tiny.make_text_encoder(),
        tokenizer=tiny.make_tokenizer(),
        unet=tiny.make_unet(),
        scheduler=tiny.make_scheduler("epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompts = ["a dog", "a word " * 40]
    ids = tokenise(pipeline.tokenizer, prompts)
    with torch.no_grad():
        mine = embed(pipeline.text_encoder, ids)
        theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert ids.shape == (2, 77) and mine.shape == (2, 77, tiny.TEXT_WIDTH)
    assert torch.equal(mine, theirs)
