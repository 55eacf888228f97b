"""The Ising model of selection masks: energy, exact marginals of small systems, mean field (docs/method.md, Posterior).

    p(xi) = exp(-E(xi)) / Z,   E(xi) = -sum_i b_i xi_i - sum_{i<j} J_ij xi_i xi_j,   xi in {0, 1}^n

Enumeration is exact for any log-weight, pairwise or not, so that the mean field can be measured against it:
docs/exact.md compares the guide's field with the exact posterior exp(prior + log-likelihood).
Shapes: n masks, M states.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_isingvit.core.errors import need

MAX_MASKS = 16  # 65,536 states


def _check_pairwise(fields: Tensor, couplings: Tensor) -> None:
    n = fields.numel()
    need(
        fields.dim() == 1 and couplings.shape == (n, n),
        f"`fields` must be (n,) and `couplings` (n, n), not {tuple(fields.shape)} and {tuple(couplings.shape)}.",
    )
    need(
        torch.equal(couplings, couplings.T) and not couplings.diagonal().any(),
        "`couplings` must be symmetric with a zero diagonal; put what acts on one mask alone into the fields.",
    )


def energy(state: Tensor, fields: Tensor, couplings: Tensor) -> Tensor:
    """Ising energy E(xi) = -b . xi - xi^T J xi / 2 of mask states, in nats; p(xi) is proportional to exp(-E).

    Args:
        state: xi, (..., n), zeros and ones.
        fields: b, (n,); b_i is the logit of P(xi_i = 1) while all other masks are dropped.
        couplings: J, (n, n), symmetric with a zero diagonal; J_ij > 0 lets i and j be kept together.

    Returns:
        (...), 0 for the state with every mask dropped.

    Raises:
        UserError: shapes that do not fit, couplings not symmetric or with a diagonal.

    Examples:
        >>> fields, couplings = torch.tensor([-1.0, 0.5]), torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> energy(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), fields, couplings)
        tensor([ 1.0000, -1.5000])
    """
    _check_pairwise(fields, couplings)
    return -(state @ fields) - 0.5 * ((state @ couplings) * state).sum(-1)


def enumerate_states(n: int) -> Tensor:
    """All states of n masks, (2^n, n); row r holds the binary digits of r, the highest first.

    Raises:
        UserError: n below 1 or above 16.

    Examples:
        >>> enumerate_states(2).tolist()
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    need(
        1 <= n <= MAX_MASKS,
        f"{n} masks cannot be enumerated, 1 to {MAX_MASKS} can (2^n states); hold some of them fixed.",
    )
    digits = torch.arange(n - 1, -1, -1)
    return (torch.arange(2**n)[:, None] >> digits & 1).to(torch.get_default_dtype())


def exact_marginals(log_weight: Callable[[Tensor], Tensor], n: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Exact P(xi_i = 1) and log Z of p(xi) proportional to exp(log_weight(xi)), by enumeration in float64.

        log Z = logsumexp_xi log_weight(xi),   P(xi_i = 1) = sum_xi xi_i exp(log_weight(xi) - log Z)

    With log_weight = log prior + log-likelihood these are the posterior marginals and the log evidence of the
    toy networks of docs/exact.md (up to the prior's own normaliser, where log_weight leaves it out).

    Args:
        log_weight: maps states (M, n) to log-weights (M,), in nats; -inf forbids a state.
        n: number of masks, at most 16.
        chunk: states per call of ``log_weight``; bounds its memory.

    Returns:
        marginals (n,) and log Z (), both float64.

    Raises:
        UserError: too many masks, a wrong shape from ``log_weight``, NaN or +inf, or no state allowed at all.

    Examples:
        >>> marginals, log_evidence = exact_marginals(lambda states: states.sum(-1), 2)  # two free masks of field 1
        >>> [round(p, 3) for p in marginals.tolist()]
        [0.731, 0.731]
    """
    states = enumerate_states(n)
    parts = []
    for block in states.split(chunk):
        part = log_weight(block)
        need(
            part.shape == block.shape[:1],
            f"`log_weight` must map states {tuple(block.shape)} to ({len(block)},), not {tuple(part.shape)}.",
        )
        parts.append(part.detach().to("cpu", torch.double))
    log_weights = torch.cat(parts)
    log_evidence = log_weights.logsumexp(0)
    need(
        bool(log_evidence.isfinite()),
        "`log_weight` gave NaN or +inf, or -inf for every state; it must be finite for at least one.",
    )
    return (log_weights - log_evidence).exp() @ states.double(), log_evidence


def mean_field(
    fields: Tensor, couplings: Tensor, damping: float = 0.5, tolerance: float = 1e-10, max_steps: int = 10_000
) -> Tensor:
    """Mean-field retention of a pairwise Ising model: the fixed point of the field equation.

        logit pi_i = b_i + sum_j J_ij pi_j

    Iterated from pi = 1 (the end of the pilot phase) as pi <- (1 - damping) pi + damping sigmoid(b + J pi), in float64.
    Strong couplings have several fixed points; this returns the one reached from there.

    Args:
        fields: b, (n,).
        couplings: J, (n, n), symmetric with a zero diagonal.
        damping: share of the new value taken at each step, in (0, 1]; 1 takes it whole.
        tolerance: largest |sigmoid(b + J pi) - pi| at which the iteration has converged.
        max_steps: before it gives up.

    Returns:
        pi, (n,), float64.

    Raises:
        UserError: shapes as in ``energy``, damping out of its range, or no convergence.

    Examples:
        >>> couplings = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> [round(pi, 3) for pi in mean_field(torch.tensor([-1.0, 0.5]), couplings).tolist()]
        [0.674, 0.864]
    """
    _check_pairwise(fields, couplings)
    need(0 < damping <= 1, f"`damping` must lie in (0, 1], not {damping}.")
    b, J = fields.double(), couplings.double()
    pi = torch.ones_like(b)
    residual = float("inf")
    for _ in range(max_steps):
        change = (b + J @ pi).sigmoid() - pi
        residual = float(change.abs().max())
        if residual <= tolerance:
            return pi
        pi = pi + damping * change
    need(False, f"the mean field did not converge in {max_steps} steps (residual {residual:.1e}); lower `damping`.")
    raise AssertionError("unreachable")
