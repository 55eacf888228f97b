"""The class of every method that is not an Ising posterior."""

from pyro_isingvit.methods.dropout import ConcreteDropout, DropConnect, Dropout
from pyro_isingvit.methods.ensemble import Ensemble
from pyro_isingvit.methods.laplace import LastLayerLaplace
from pyro_isingvit.methods.plain import Baseline
from pyro_isingvit.methods.sparse import L0, Magnitude, SparseVD

BASELINES: dict[str, type[Baseline] | type[Ensemble]] = {
    "deterministic": Baseline,
    "temperature": Baseline,  # the same, with T fitted on the validation part
    "dropout": Dropout,
    "dropconnect": DropConnect,
    "concrete-dropout": ConcreteDropout,
    "sparse-vd": SparseVD,
    "l0": L0,
    "magnitude": Magnitude,
    "ensemble": Ensemble,
    "laplace": LastLayerLaplace,
}
