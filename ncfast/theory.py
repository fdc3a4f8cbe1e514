"""What the theorems of Papyan, Han & Donoho (PNAS 2020) predict: the simplex ETF and its classifiers."""

import math

import torch

from ncfast.ops.pair_geometry import decision_radius
from ncfast.statistics import ClassStatistics


def simplex_etf(
    C: int,
    p: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The standard simplex equiangular tight frame, one unit vector per row, all cosines −1/(C − 1).

    The rows are the columns of the paper's M = U M*, M* = √(C/(C − 1)) (I − 𝟙𝟙ᵀ/C), UᵀU = I.

    Args:
        C: vectors, at least 2.
        p: dimensions, at least C − 1.
        generator: draws a random pose U; None gives U = [I; 0] (for p = C − 1, in an orthonormal basis of the
            span).
        dtype: of the result.
        device: of the result.

    Returns:
        [C, p].

    Raises:
        ValueError: C < 2, or p < C − 1, where no simplex ETF exists.

    Source: Papyan, Han & Donoho (PNAS 2020), definition 1.

    """
    if C < 2 or p < C - 1:
        raise ValueError(f"a simplex ETF needs C ≥ 2 and p ≥ C − 1, got C={C}, p={p}")
    frame = math.sqrt(C / (C - 1)) * (torch.eye(C, dtype=torch.float64) - 1 / C)
    if p < C or generator is not None:
        # Coordinates in an orthonormal basis of the span 𝟙^⊥, whose dimension is C − 1.
        frame = frame @ torch.linalg.eigh(frame).eigenvectors[:, 1:]
    width = frame.shape[1]
    pose = torch.eye(p, width, dtype=torch.float64)
    if generator is not None:
        pose = torch.linalg.qr(
            torch.randn(p, width, dtype=torch.float64, generator=generator, device=generator.device).cpu()
        ).Q
    return (frame @ pose.T).to(dtype=dtype, device=device)


def webb_lowe_classifier(stats: ClassStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares classifier on the features: W = Ṁ Σ_T†/C, b = 1/C − W μ_G.

    Args:
        stats: statistics with a scatter; every class must be present.

    Returns:
        W [C, p] and b [C], float64. The pseudo-inverse drops eigenvalues below p · 2⁻⁵² of the largest.

    Raises:
        ValueError: a class without samples, or statistics without a scatter.

    Source: Webb & Lowe (1990); Proposition 1, eq. [6], of Papyan, Han & Donoho (PNAS 2020), for balanced
    classes.

    """
    if not stats.present.all():
        raise ValueError("the Webb–Lowe classifier needs at least one sample of every class")
    centred = stats.means - stats.global_mean
    weight = centred @ torch.linalg.pinv(stats.total_covariance, hermitian=True) / stats.num_classes
    return weight, 1 / stats.num_classes - weight @ stats.global_mean


def error_exponent(means: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """β = −lim σ² log P(error) as σ → 0, when h = μ_γ + N(0, σ² I) is decided by argmax_c ⟨w_c, h⟩ + b_c.

    β = ½ min_a ρ_a², ρ_a the distance from μ_a to its decision boundary; 0 where a mean is itself decided
    wrongly. Its maximum over means of norm at most 1 is C/(C − 1)/4, attained by the simplex ETF.

    Args:
        means: [C, p] floating point.
        weight: [C, p] floating point.
        bias: [C] floating point, or None for zeros.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not agree.

    Source: Theorem 3 of Papyan, Han & Donoho (PNAS 2020).

    """
    return 0.5 * float(decision_radius(weight, bias, means).min().clamp(min=0.0)) ** 2
