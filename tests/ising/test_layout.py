"""Mask sites of networks with another structure: they follow from the description."""

import torch

from pyro_isingvit.ising.layout import block_sites, head_sites, unit_sites, weight_sites
from pyro_isingvit.nets.readers import Matrix, Readers, Space

STREAM = Space("stream", 6)
# Two blocks of q, k and v as matrices of their own, wider than the stream, and two things to predict.
READERS = Readers((
    Matrix("patch", 0, Space("image", 5), STREAM),
    *(
        matrix
        for b in range(2)
        for heads in [Space("attention", 8, b, 4)]
        for matrix in (
            Matrix("q", b, STREAM, heads, b, ("head",)),
            Matrix("kv", b, STREAM, heads, b, ("head", "own")),
            Matrix("out", b, heads, STREAM),
        )
    ),
    Matrix("label", 0, STREAM, Space("label logits", 3), 2),
    Matrix("place", 0, STREAM, Space("place logits", 2), 2),
))  # fmt: skip


def covered(sites) -> dict[str, list[str]]:
    return {site.name: [*site.spreads] for site in sites}


def test_units_are_rows_and_for_what_predicts_columns() -> None:
    sites = {site.name: site for site in unit_sites(READERS)}
    assert {name: site.shape for name, site in sites.items()} == {
        "patch": (1, 6), "q": (2, 8), "kv": (2, 16), "out": (2, 6), "label": (1, 6), "place": (1, 6),
    }  # fmt: skip
    assert sites["place"].dims == ("layer", "in") and sites["out"].dims == ("layer", "out")
    assert {site.name: site.shape for site in weight_sites(READERS)} == READERS.shapes


def test_heads_and_blocks_take_all_matrices_of_a_branch() -> None:
    rest = {"patch": ["patch"], "label": ["label"], "place": ["place"]}
    assert covered(head_sites(READERS)) == covered(block_sites(READERS)) == rest | {"attention": ["q", "kv", "out"]}
    heads = {site.name: site for site in head_sites(READERS)}["attention"]
    assert heads.shape == (2, 4) and heads.coupled_kind == "out"
    masks = torch.ones(2, 4)
    masks[1, 2] = 0.0  # block 1, head 2: channels 4 and 5
    gone = {"q": ([4, 5], None), "kv": ([4, 5, 12, 13], None), "out": (None, [4, 5])}
    for kind, (rows, columns) in gone.items():
        expected = torch.ones(READERS.shapes[kind])
        if rows:
            expected[1, rows] = 0.0
        if columns:
            expected[1, :, columns] = 0.0
        spread = heads.spreads[kind]
        torch.testing.assert_close(spread.expand(masks).expand_as(expected), expected)
        field = torch.randn(expected.shape)
        torch.testing.assert_close((spread.reduce(field) * masks).sum(), (field * expected).sum())
