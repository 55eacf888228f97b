"""Coupling against loops written from the formula, and the properties that docs/method.md, Coupling, asks for."""

import pytest
import torch

from pyro_isingvit.ising.coupling import COUPLINGS, Network
from pyro_isingvit.nets.readers import Matrix, Readers, Space, vit_readers

D, H, F, L, C, P, DECAY = 6, 2, 8, 3, 3, 5, 0.5
HEAD_DIM = D // H
SIZES = {"patch": P, "width": D, "heads": H, "depth": L, "hidden": F, "classes": C}


def network(two_layer_head: bool, seed: int = 0):
    torch.manual_seed(seed)
    return of(vit_readers(**SIZES, top=D // 2 if two_layer_head else None))


def of(readers: Readers):
    squared = {kind: torch.rand(shape) for kind, shape in readers.shapes.items()}
    retention = {kind: torch.rand(shape) for kind, shape in readers.shapes.items()}
    return Network(squared, torch.rand(2 * L + 1, D) + 0.5, readers, DECAY), retention


def fields(name: str, net: Network, retention) -> dict[tuple[str, int], torch.Tensor]:
    """c of every (kind, layer), with the retention held fixed."""
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def update(kind, layer, c):
        assert (kind, layer) not in seen, "visited twice"
        rows, columns = net.squared[kind][layer].shape
        seen[kind, layer] = c.expand(rows, columns).clone() if 1 in c.shape else c
        return retention[kind][layer]

    COUPLINGS[name](net, update)
    return seen


def c_from_readers(net, retention, readers, column) -> float:
    """The formula: sum over readers of rho gamma^2 sum_k w^2 pi over the same without pi."""
    top = bottom = 0.0
    for kind, layer, rho, norm in readers:
        gain = 1.0 if norm is None else float(net.gain[norm, column])
        w2, pi = net.squared[kind][layer][:, column], retention[kind][layer][:, column]
        top += rho * gain * float((w2 * pi).sum())
        bottom += rho * gain * float(w2.sum())
    return top / bottom


def residual_readers(after: int, decay: float, two_layer_head: bool):
    """Readers of a residual channel, nearest first; ``after`` counts norms: 2b = qkv of block b, 2b + 1 = fc1 of b."""
    readers = [("qkv" if norm % 2 == 0 else "fc1", norm // 2, norm) for norm in range(after, 2 * L)]
    readers.append(("head_hidden" if two_layer_head else "head", 0, 2 * L))
    return [(kind, layer, decay**distance, norm) for distance, (kind, layer, norm) in enumerate(readers)]


@pytest.mark.parametrize("two_layer_head", [False, True])
@pytest.mark.parametrize(("name", "decay"), [("all_readers", DECAY), ("nearest", 0.0)])
def test_against_loops_from_the_formula(name: str, decay: float, two_layer_head: bool) -> None:
    net, retention = network(two_layer_head)
    seen = fields(name, net, retention)
    assert set(seen) == {(kind, layer) for kind, w in net.squared.items() for layer in range(len(w))}

    def check(kind, layer, row, expected):
        torch.testing.assert_close(seen[kind, layer][row], torch.full_like(seen[kind, layer][row], expected))

    for b in range(L):
        for f in range(F):
            check("fc1", b, f, c_from_readers(net, retention, [("fc2", b, 1.0, None)], f))
        for j in range(D):
            check(
                "attn_out", b, j, c_from_readers(net, retention, residual_readers(2 * b + 1, decay, two_layer_head), j)
            )
            check("fc2", b, j, c_from_readers(net, retention, residual_readers(2 * b + 2, decay, two_layer_head), j))
        w2, pi = net.squared["attn_out"][b], retention["attn_out"][b]
        for h in range(H):
            columns = range(h * HEAD_DIM, (h + 1) * HEAD_DIM)
            pooled = sum(float((w2[:, k] * pi[:, k]).sum()) for k in columns) / sum(
                float(w2[:, k].sum()) for k in columns
            )
            for k in columns:
                check("qkv", b, k, pooled)  # q
                check("qkv", b, D + k, pooled)  # k
                check("qkv", b, 2 * D + k, c_from_readers(net, retention, [("attn_out", b, 1.0, None)], k))  # v
    for j in range(D):
        check("patch", 0, j, c_from_readers(net, retention, residual_readers(0, decay, two_layer_head), j))
    if two_layer_head:
        for j in range(D // 2):
            check("head_hidden", 0, j, c_from_readers(net, retention, [("head", 0, 1.0, None)], j))
    check("head", 0, 0, 0.0)


@pytest.mark.parametrize("name", COUPLINGS)
def test_c_lies_between_0_and_1_and_is_finite_for_dead_readers(name: str) -> None:
    net, retention = network(False)
    for squared in net.squared.values():
        squared[..., 0] = 0.0  # no reader of channel 0 has any weight
    for c in fields(name, net, retention).values():
        assert torch.isfinite(c).all() and (c >= 0).all() and (c <= 1 + 1e-6).all()


@pytest.mark.parametrize("name", ["all_readers", "nearest"])
def test_dropping_every_reader_of_a_channel_lowers_its_c(name: str) -> None:
    net, retention = network(False)
    before = fields(name, net, retention)
    for kind in ("qkv", "fc1", "head"):
        retention[kind][..., 2] = 0.0
    after = fields(name, net, retention)
    for kind in ("patch", "attn_out", "fc2"):
        for layer in range(len(net.squared[kind])):
            assert (after[kind, layer][2] < before[kind, layer][2]).all()
            torch.testing.assert_close(after[kind, layer][3], before[kind, layer][3])  # the others are untouched


def test_without_coupling_c_is_zero() -> None:
    net, retention = network(True)
    assert all((c == 0).all() for c in fields("none", net, retention).values())


def test_forward_coupling_against_loops() -> None:
    net, retention = network(True)
    seen = fields("forward", net, retention)

    def written(kind, layer, row) -> tuple[float, float]:
        w2, pi = net.squared[kind][layer][row], retention[kind][layer][row]
        return float((w2 * pi).sum()), float(w2.sum())

    def stream(channel: int, upto: int) -> float:
        """Writers of a residual channel, nearest first: attention output and fc2 of the blocks before, the patches."""
        writers = [("patch", 0)] + [(kind, b) for b in range(L) for kind in ("attn_out", "fc2")]
        sums = [written(kind, b, channel) for kind, b in reversed(writers[: upto + 1])]
        top, bottom = (sum(DECAY**i * pair[part] for i, pair in enumerate(sums)) for part in (0, 1))
        return top / bottom

    for b in range(L):
        for j in range(D):
            assert seen["qkv", b][0, j] == pytest.approx(stream(j, 2 * b), rel=1e-4)
            assert seen["fc1", b][0, j] == pytest.approx(stream(j, 2 * b + 1), rel=1e-4)
            top, bottom = written("qkv", b, 2 * D + j)
            assert seen["attn_out", b][0, j] == pytest.approx(top / bottom, rel=1e-4)
        for f in range(F):
            top, bottom = written("fc1", b, f)
            assert seen["fc2", b][0, f] == pytest.approx(top / bottom, rel=1e-4)
    for j in range(D):
        assert seen["head_hidden", 0][0, j] == pytest.approx(stream(j, 2 * L), rel=1e-4)
    assert (seen["patch", 0] == 0).all()


def test_fused_qkv_rows_are_those_of_an_unfused_network() -> None:
    """q, k and v as three matrices per head, coupled one by one, against the fused index arithmetic."""
    net, retention = network(False)
    fused = fields("all_readers", net, retention)["qkv", 1][:, 0].view(3, H, HEAD_DIM)  # part, head, position
    w2, pi = net.squared["attn_out"][1].view(D, H, HEAD_DIM), retention["attn_out"][1].view(D, H, HEAD_DIM)
    for h in range(H):
        head_share = (w2[:, h] * pi[:, h]).sum() / w2[:, h].sum()
        torch.testing.assert_close(fused[0, h], head_share.expand(HEAD_DIM))
        torch.testing.assert_close(fused[1, h], head_share.expand(HEAD_DIM))
        torch.testing.assert_close(fused[2, h], (w2[:, h] * pi[:, h]).sum(0) / w2[:, h].sum(0))


# Other networks: only the description differs ------------------------------------------------------------------------


def with_probe(after: int) -> Readers:
    """The network, and one more reader of the stream: a probe that looks at it after the MLP of a block."""
    readers = vit_readers(**SIZES)
    place = readers.matrices.index(readers.matrix("fc2", after)) + 1
    probe = Matrix("probe", 0, readers.matrix("patch").writes, Space("probe logits", 4))
    return Readers((*readers.matrices[:place], probe, *readers.matrices[place:]))


def test_one_more_reader_of_the_stream_is_read_off_the_description() -> None:
    net, retention = of(with_probe(1))
    seen = fields("all_readers", net, retention)
    for j in range(D):
        # fc2 of block 1: the probe is nearest and has no LayerNorm, then come the readers that there were.
        later = [(kind, layer, DECAY * rho, norm) for kind, layer, rho, norm in residual_readers(4, DECAY, False)]
        expected = c_from_readers(net, retention, [("probe", 0, 1.0, None), *later], j)
        assert float(seen["fc2", 1][j, 0]) == pytest.approx(expected, rel=1e-4)
        # fc2 of block 2 lies behind it and is as it was.
        expected = c_from_readers(net, retention, residual_readers(6, DECAY, False), j)
        assert float(seen["fc2", 2][j, 0]) == pytest.approx(expected, rel=1e-4)
    assert (seen["probe", 0] == 0).all()  # nothing reads what it writes
    near = fields("nearest", net, retention)
    assert float(near["fc2", 1][0, 0]) == pytest.approx(c_from_readers(net, retention, [("probe", 0, 1, None)], 0))
    everything = {(matrix.kind, matrix.layer) for matrix in net.readers.matrices}
    assert all(set(fields(name, net, retention)) == everything for name in COUPLINGS)


def test_unfused_projections_couple_as_fused_ones_do() -> None:
    """q, k and v as three matrices: the same c as the fused matrix's rows."""
    fused, retention = network(False)
    parts = {"q": ("head",), "k": ("head",), "v": ("own",)}
    matrices = [
        Matrix(kind, m.layer, m.reads, m.writes, m.norm, rows)
        for m in fused.readers.matrices
        for kind, rows in (parts.items() if m.kind == "qkv" else [(m.kind, m.parts)])
    ]

    def split(fields):
        q, k, v = fields["qkv"].chunk(3, 1)
        return {kind: field for kind, field in fields.items() if kind != "qkv"} | {"q": q, "k": k, "v": v}

    net = Network(split(fused.squared), fused.gain, Readers(tuple(matrices)), DECAY)
    expected, seen = fields("all_readers", fused, retention), fields("all_readers", net, split(retention))
    last = L - 1  # behind it, one fused matrix is one reader and three are three
    torch.testing.assert_close(torch.cat([seen[kind, last] for kind in "qkv"]), expected["qkv", last])
    expected, seen = fields("forward", fused, retention), fields("forward", net, split(retention))
    for b in range(L):
        torch.testing.assert_close(seen["attn_out", b], expected["attn_out", b])
