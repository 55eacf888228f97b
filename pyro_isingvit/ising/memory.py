"""What training an Ising posterior takes, in bytes."""

from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.ising.fused import DRAWS
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.nets.vit import ViT


def training_memory(model: IsingViT, guide: IsingGuide, settings: TrainConfig, processes: int = 1) -> dict[str, int]:
    """Bytes that a training step of the fused ELBO takes, without images and activations; all numbers have 4 bytes.

    With P masked weights, G masks, R other parameters (biases, norms, embeddings; M learned mask logits too), l = 1
    where the scale of every weight is learned and otherwise 0, a = 1 where weights are averaged and otherwise 0, and s
    the draws of a micro-batch:

        weight_means         4 P        posterior_scale  4 P, one number a weight even where they are all the same;
                                                         8 P where they follow the curvature: log s and s
        curvature            4 P        mask_logits      4 G        prior_logits  4 G        other_parameters  4 R
        gradients            4 (P + l P + R)                        adamw  8 (P + l P + R), both without frozen blocks,
                                                         whose rows have no moments, and no gradient where a parameter
                                                         is of frozen blocks alone
        average              4 a (P + l P + R - M)               centre           4 P where training starts from a
                                                                  trained network, and 4 for each weight of a trunk
                                                                  that is not frozen; otherwise 0
        draws                4 [s (P + G) + P + G + 4 l P]          kept for the backward pass: draws, masks, KL, pi
        draw_gradients       4 s P                                  alive towards the end of the backward pass

        s = max(1, draws / (processes * accumulate))

    A masked weight thus takes 4 (7 + a + 3 G/P + (7 + a) l + s (2 + G/P)) bytes: 92 with a mask of its own and 4 draws,
    and 56 with one draw; 64 and 40 with unit, head or block masks, where G/P is near 0, of which 40 is the default.
    DDP's buckets are the gradients' own memory. Noise on activations is not covered. The curvature pass and the sweep
    of the masks come before the draws and take less.

    A large network (ising/lean.py), with K kinds of matrices, the largest of N numbers over its layers, has 4 K for the
    scales, 4 G for the curvature, 2 P for the centre, 4 (masks + G) for the draws, made layer by layer, and 4 N for
    their gradients: 20 to 22 bytes a masked weight without averaging, where plain AdamW takes 16.

    Args:
        model: the generative model.
        guide: its posterior.
        settings: draws, micro-batches and averaging.
        processes: W, that share each batch out.

    Returns:
        bytes by name, as above, and their sum, ``total``; and ``per_masked_weight``, total / P rounded.

    Examples:
        >>> from pyro_isingvit import IsingGuide, IsingViT, TrainConfig, ViTConfig, load_data, training_memory
        >>> data = load_data("digits", train_size=100)
        >>> model = IsingViT.for_data(data, ViTConfig(patch_size=4, width=8, heads=2, depth=1))
        >>> taken = training_memory(model, IsingGuide(model, num_data=100), TrainConfig())
        >>> taken["weight_means"], taken["total"]
        (3904, 66024)
    """
    p = model.num_masked_weights
    g = sum(guide.field(name).numel() for name in guide.layout.sites)
    learned_logits = sum(logit.numel() for logit in guide.masks.parameters())
    r = sum(value.numel() for value in model.parameters()) + learned_logits
    learned = guide.config.posterior_scale == "learned"
    followed = guide.config.posterior_scale == "curvature"
    draws = settings.draws or (DRAWS if guide.config.granularity == "weight" else "image")
    s = 1 if draws == "image" else max(1, draws // (processes * settings.accumulate))
    masks = g * (settings.batch_size if draws == "image" else s)
    trained, (still, resting) = p + learned * p + r, _frozen(model.vit)
    lean = guide.lean and draws == "image"
    centre = sum(value.numel() for name, value in model.vit.named_buffers() if name.startswith("centre_"))
    largest = max(loc.numel() for loc in guide.loc.values())
    numbers = {
        "weight_means": p, "posterior_scale": p + followed * p, "curvature": p, "mask_logits": g, "prior_logits": g,
        "other_parameters": r, "gradients": trained - still, "adamw": 2 * (trained - resting),
        "average": (trained - learned_logits) * (settings.average > 0),
        "draws": s * p + masks + p + g + 4 * learned * p, "draw_gradients": s * p, "centre": centre,
    }  # fmt: skip
    if lean:
        numbers |= {"posterior_scale": len(guide.kinds), "curvature": g, "draws": masks + g, "draw_gradients": largest,
                    "centre": centre // 2}  # fmt: skip
    taken = {name: 4 * number for name, number in numbers.items()}
    total = sum(taken.values())
    return taken | {"total": total, "per_masked_weight": round(total / p)}


def _frozen(vit: ViT) -> tuple[int, int]:
    """Numbers of parameters that are frozen as a whole, and of all rows that are (runs/layerwise.py)."""
    if not vit.frozen:
        return 0, 0
    rows = {vit.norm_gain: 2 * vit.frozen, vit.norm_bias: 2 * vit.frozen}
    rows |= {each: vit.frozen_layers(kind) for part in (vit.bias, vit.trunk) for kind, each in part.items()}
    shares = [(each, min(1.0, rows.get(each, len(each)) / len(each))) for each in vit.parameters()]
    return sum(each.numel() for each, share in shares if share == 1), sum(
        round(share * p.numel()) for p, share in shares
    )
