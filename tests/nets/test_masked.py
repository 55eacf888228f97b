"""Masked-image modelling: what is hidden stays hidden, and the loss is what it says."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from pyro_isingvit import UserError, ViTConfig
from pyro_isingvit.nets.masked import MaskedImages
from pyro_isingvit.nets.vit import ViT

SHAPE = ViTConfig(patch_size=2, width=16, heads=2, depth=1, mlp_ratio=2)


def made(share=0.75, **changes):
    torch.manual_seed(0)
    return MaskedImages(ViT(replace(SHAPE, **changes), 1, 8, 8, classes=2), share, width=16)


def test_hidden_patches_do_not_reach_the_network():
    net, x = made(), torch.randn(3, 1, 8, 8)
    order = net.draw(3, x.device)
    before = net.guessed(x, order)
    patches = net.vit.patchify(x)
    hidden = torch.ones(3, 16).scatter(1, order[:, : net.shown], 0.0).bool()
    assert hidden.sum(1).tolist() == [12, 12, 12]
    noisy = torch.where(hidden[..., None], torch.randn_like(patches), patches)
    image = noisy.view(3, 4, 4, 1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 1, 8, 8)
    assert_close(net.vit.patchify(image), noisy)
    assert_close(net.guessed(image, order), before)
    seen = torch.where(hidden[..., None], patches, torch.randn_like(patches))
    image = seen.view(3, 4, 4, 1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 1, 8, 8)
    assert not torch.allclose(net.guessed(image, order), before)


def test_the_loss_is_the_mean_over_hidden_patches():
    net, x = made(0.5), torch.randn(4, 1, 8, 8)
    order = net.draw(4, x.device)
    guess, patches = net.guessed(x, order), net.vit.patchify(x)
    losses = []
    for b in range(4):
        for t in order[b, net.shown :].tolist():
            target = (patches[b, t] - patches[b, t].mean()) / (patches[b, t].var(correction=0) + 1e-6).sqrt()
            losses.append(((guess[b, t] - target) ** 2).mean())
    assert_close(net(x, order), torch.stack(losses).mean())


def test_tokens_return_to_their_places():
    """A decoder that adds nothing must give each place its own token back."""
    net, x = made(0.5, pool="cls", registers=1), torch.randn(2, 1, 8, 8)
    net.decoder = torch.nn.Identity()
    order = net.draw(2, x.device)
    guess = net.guessed(x, order)
    with torch.no_grad():
        hidden = net.leave(net.hidden + net.position)
    for b in range(2):
        assert_close(guess[b, order[b, net.shown :]], hidden[order[b, net.shown :]])
        assert not torch.allclose(guess[b, order[b, : net.shown]], hidden[order[b, : net.shown]])


def test_every_parameter_but_the_head_learns():
    net, x = made(), torch.randn(8, 1, 8, 8)
    net(x, net.draw(8, x.device)).backward()
    last = 2 * SHAPE.depth
    for name, parameter in net.named_parameters():
        if "head" in name:
            assert not parameter.requires_grad
        elif name in ("vit.norm_gain", "vit.norm_bias"):  # the last LayerNorm belongs to the head
            assert parameter.grad[:last].any(1).all() and not parameter.grad[last].any()
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("share, message", [(0.99, "shows all or none"), (0.01, "shows all or none")])
def test_shares_that_cannot_be(share, message):
    with pytest.raises(UserError, match=message):
        made(share)


def test_a_decoder_that_cannot_be():
    with pytest.raises(UserError, match="multiple of 16"):
        MaskedImages(ViT(SHAPE, 1, 8, 8, classes=2), 0.5, width=20)


def test_patches_that_overlap_cannot_be_hidden():
    with pytest.raises(UserError, match="`patch_stride` would let the network see"):
        MaskedImages(ViT(replace(SHAPE, patch_stride=1), 1, 8, 8, classes=2), 0.5, width=16)
