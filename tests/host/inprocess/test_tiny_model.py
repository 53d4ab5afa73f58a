"""The embedded model in the host's classes is the same as in diffusers'."""

from __future__ import annotations

import torch

from hyperalign.tiny.text_encoder import tokenize


def test_the_unet_predicts_what_diffusers_predicts(tiny):
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([999, 10]), torch.randn(2, 32, 128)
    with torch.no_grad():
        found = tiny.model.model.diffusion_model(x, t.float(), context=context)
        torch.testing.assert_close(found, tiny.unet(x, t, context).sample, atol=1e-5, rtol=0)


def test_the_vae_decodes_and_encodes_64_pixels(tiny):
    latents = torch.randn(2, 4, 16, 16)
    with torch.inference_mode():
        images = tiny.vae.decode(latents)
        assert tiny.vae.encode(images).shape == latents.shape
        expected = (tiny.autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_a_prompt_is_encoded_as_in_training(tiny):
    text = "a red heart and two dogs"
    expected = tiny.text_encoder(torch.tensor(tokenize(text)))
    torch.testing.assert_close(tiny.condition(text)[0][0], expected, atol=1e-5, rtol=0)


def test_long_prompts_become_several_chunks(tiny):
    assert tiny.condition("a dog and " * 5 + "a cat")[0][0].shape == (1, 32, 128)
    assert tiny.condition("")[0][0].shape == (1, 16, 128)


def test_weights_of_words_act_and_one_is_neutral(tiny):
    plain = tiny.condition("a red heart")[0][0]
    torch.testing.assert_close(tiny.condition("a (red:1.0) heart")[0][0], plain, atol=1e-5, rtol=0)
    assert not torch.allclose(tiny.condition("a (red:1.5) heart")[0][0], plain, atol=1e-3)


def test_clip_skip_is_ignored(tiny):
    clip = tiny.clip.clone()
    clip.clip_layer(-2)
    skipped = clip.encode_from_tokens_scheduled(clip.tokenize("a dog"))[0][0]
    assert torch.equal(skipped, tiny.condition("a dog")[0][0])
