"""What trains pruned networks further does the same for the compact network and for its peers."""

import numpy as np
import torch
from torch import nn

from inference.prune_tuning import on_labels
from pyro_isingvit import fit
from pyro_isingvit.data.split import ImageData


def test_peers_of_a_balanced_run_keep_equal_shares() -> None:
    """Images that look alike, one in four of class 1: under equal classes there is nothing to choose between."""
    images = np.zeros((60, 8, 8), dtype=np.uint8)
    images[0, 0, 0] = 255
    data = ImageData.from_arrays(images, [0, 0, 0, 1] * 15)
    shares = {}
    for balance in ("none", "loss"):
        run = fit("digits", data, epochs=1, balance=balance, lr=0.1, progress=False)
        peer = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with torch.no_grad():
            peer[1].weight.zero_()
        on_labels(run, data, 200).peer(peer)
        shares[balance] = float(peer(torch.zeros(1, 1, 8, 8)).detach().softmax(-1)[0, 1])
    assert abs(shares["loss"] - 0.5) < 0.05 and abs(shares["none"] - 0.25) < 0.05
