"""NC1–NC4 and their kin from a ClassStatistics, in float64, on matrices of size min(C, p) only."""

import dataclasses
import math
from typing import Any, cast

import torch

from ncfast.ops.class_scatter import check_in_memory
from ncfast.ops.pair_geometry import PairGeometry, etf_error, pair_geometry
from ncfast.statistics import ClassStatistics, weighted_mean

GLOBAL_MEANS = ("samples", "classes")
_EMPTY = "the statistics hold no samples"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollapseReport:
    """Every neural-collapse number of one set of features; None for what could not be measured.

    C counts the classes present, m_c = μ_c − μ_G are the centred class means, Ṁ = [m_c] and W = [w_c] hold
    one row per class present; Avg and Std (population) run over the classes or over the pairs c ≠ c′. "Fig."
    and "Table" are those of Papyan, Han & Donoho, PNAS 2020. All values are dimensionless but the two traces,
    which are in squared feature units.
    """

    nc1: float | None = None
    """NC1, Fig. 6: Tr(Σ_W Σ_B†)/C. Eigenvalues of Σ_B below max(C, p) · 2⁻⁵² of the largest count as zero."""
    nc2_equinorm_means: float | None = None
    """NC2, Fig. 2: Std_c ‖m_c‖ / Avg_c ‖m_c‖."""
    nc2_equinorm_classifier: float | None = None
    """NC2, Fig. 2: Std_c ‖w_c‖ / Avg_c ‖w_c‖."""
    nc2_equiangular_means: float | None = None
    """NC2, Fig. 3: Std_{c ≠ c′} cos(m_c, m_c′)."""
    nc2_equiangular_classifier: float | None = None
    """NC2, Fig. 3: Std_{c ≠ c′} cos(w_c, w_c′)."""
    nc2_max_angle_means: float | None = None
    """NC2, Fig. 4: Avg_{c ≠ c′} |cos(m_c, m_c′) + 1/(C − 1)|."""
    nc2_max_angle_classifier: float | None = None
    """NC2, Fig. 4: Avg_{c ≠ c′} |cos(w_c, w_c′) + 1/(C − 1)|."""
    nc3_self_duality: float | None = None
    """NC3, Fig. 5: ‖W/‖W‖_F − Ṁ/‖Ṁ‖_F‖_F²."""
    nc4_disagreement: float | None = None
    """NC4, Fig. 7: share of the samples in `nc4_data` where argmax_c ⟨w_c, h⟩ + b_c ≠ argmin_c ‖h − μ_c‖.

    The classifier chooses among all its classes, the nearest class centre among those present in the training
    data."""
    trace_within: float | None = None
    """Tr Σ_W, the within-class variance (Ave over samples)."""
    trace_between: float | None = None
    """Tr Σ_B, the between-class variance (Ave over classes)."""
    trace_ratio: float | None = None
    """Tr Σ_W / Tr Σ_B: NC1 without the pseudo-inverse, as in Tirer, Huang & Niles-Weed (ICML 2023)."""
    cdnv: float | None = None
    """Class-distance normalised variance, Avg_{c ≠ c′} (s_c + s_c′) / (2 ‖μ_c − μ_c′‖²), s_c = Ave_i ‖h_i −
    μ_c‖².

    Galanti, György & Hutter (ICLR 2022)."""
    etf_error_means: float | None = None
    """‖ṀṀᵀ/‖ṀṀᵀ‖_F − (I − 𝟙𝟙ᵀ/C)/√(C − 1)‖_F: distance from a simplex ETF; Zhu et al. (NeurIPS 2021)."""
    etf_error_classifier: float | None = None
    """The same of W Wᵀ: "NC2" of Zhu et al. (NeurIPS 2021)."""
    etf_error_product: float | None = None
    """The same of W Ṁᵀ: "NC3" of Zhu et al. (NeurIPS 2021)."""
    gnc2: float | None = None
    """GNC2, hyperspherical uniformity: Std/|Avg| over pairs of log ‖m̂_c − m̂_c′‖⁻¹, m̂ = m/‖m‖.

    Logarithmic inverse-distance kernel, as in Wu & Papyan (NeurIPS 2024) after Liu et al. (ICLR 2023)."""
    unc3: float | None = None
    """UNC3, uniform duality: Std_c/|Avg_c| of cos(w_c, m_c); Wu & Papyan (NeurIPS 2024)."""
    certified_share: float | None = None
    """Share of the samples in `nc4_data` decided by their distance to the class mean alone."""
    train_accuracy: float | None = None
    """Share of the training samples that the classifier labels correctly: 1 in the terminal phase."""
    test_accuracy: float | None = None
    """Share of the test samples that the classifier labels correctly: Table 1."""

    num_samples: int
    """N, training samples."""
    num_classes: int
    """C, the classes with at least one training sample."""
    num_absent: int
    """Classes without a training sample, left out of every average over classes."""
    num_skipped: int
    """Training samples left out by nonfinite="skip"."""
    dim: int
    """p."""
    global_mean: str
    """What μ_G averages over: "samples" (the paper's) or "classes". They differ for unbalanced classes."""
    nc4_data: str | None = None
    """The data behind `nc4_disagreement` and `certified_share`: "train" or "test"."""

    def as_dict(self) -> dict[str, float | int | str | None]:
        """All fields by name, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        width = max(len(name) for name in self.as_dict())
        return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in self.as_dict().items())


def collapse(
    stats: ClassStatistics,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    global_mean: str = "samples",
) -> CollapseReport:
    """Compute NC1–NC3 and their kin from accumulated statistics.

    NC4 needs the features again: see `measure` and `measure_model`. NC1 comes from a Cholesky factor of
    the [C, C] Gram matrix of the means, or where C > p of Σ_B, in float64, and where they are ill-conditioned
    from an eigenproblem of the same size; never from a p×p pseudo-inverse. A GPU is waited for once, to read
    the numbers; again where a class is absent, for it is left out then, or for the eigenproblem.

    Args:
        stats: at least one sample; without its scatter NC1 is None.
        weight: [num_classes, p] floating point, the classifier W, on the device of `stats`; None leaves its
            numbers None.
        bias: [num_classes] floating point or None. Checked only: NC1–NC3 do not depend on it.
        global_mean: "samples" (the paper's μ_G, Ave over samples) or "classes" (Ave over classes).

    Returns:
        CollapseReport. Classes without a sample are left out, of the classifier's NC2 and NC3 too. With one
        class, or class means that all coincide, what compares classes is None.

    Raises:
        ValueError: no samples, or arguments that do not fit. TypeError: a wrong dtype.

    Source: Papyan, Han & Donoho (PNAS 2020), §3 and Figs. 2–6; the kin as said in `CollapseReport`.
    """
    return collapse_and_distances(stats, weight, bias, global_mean=global_mean)[0]


def collapse_and_distances(
    stats: ClassStatistics,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    global_mean: str = "samples",
) -> tuple[CollapseReport, torch.Tensor, torch.Tensor]:
    """`collapse`; the classes present [C]; and their distances from the nearest other mean, ∞ if alone."""
    check_global_mean(global_mean)
    check_classifier(weight, bias, stats.num_classes, stats.dim, stats.counts.device)
    counts = stats.counts
    facts = [counts.sum(), counts.count_nonzero(), stats._skipped]
    present = torch.arange(len(counts), device=counts.device)
    if counts.device.type == "cpu":
        present = present[counts > 0]
        if len(present) == 0:
            raise ValueError(_EMPTY)
    else:
        # A GPU is waited for once, in `_read`: until then every class is taken to be present, and the
        # classifier to be finite.
        facts += [tensor.isfinite().all() for tensor in (weight, bias) if tensor is not None]
    with stats._unquestioned():
        numbers, centred, distances = _numbers(stats, weight, present, global_mean)
    read = stats._read([*facts, *numbers.values()])
    (num_samples, num_present, num_skipped, *passed), values = read[: len(facts)], read[len(facts) :]
    if num_samples == 0:
        raise ValueError(_EMPTY)
    if not all(passed):
        _check_finite(weight, bias)
    if num_present < len(present):
        present = present[counts > 0]
        numbers, centred, distances = _numbers(stats, weight, present, global_mean)
        values = stats._read(numbers.values())
    measured: dict[str, Any] = dict(zip(numbers, values, strict=True))
    if math.isnan(measured.get("nc1", 0.0)):
        measured["nc1"] = _nc1_by_eigenvalues(stats, centred).item()
    report = CollapseReport(
        **{name: value for name, value in measured.items() if math.isfinite(value)},
        num_samples=int(num_samples),
        num_classes=len(present),
        num_absent=len(counts) - len(present),
        num_skipped=int(num_skipped),
        dim=stats.dim,
        global_mean=global_mean,
    )
    return report, present, distances


def _numbers(
    stats: ClassStatistics, weight: torch.Tensor | None, present: torch.Tensor, global_mean: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """What a report says of the classes `present` [C], NaN where it cannot be said, without waiting for it.

    Returns the numbers by name, [] float64 each; the centred means [C, p]; and their distances as
    `collapse_and_distances` does.
    """
    those = present if len(present) < stats.num_classes else slice(None)  # which copies nothing
    means = stats.means[those]  # [C, p]
    counts = stats.counts[those]
    weights = counts if global_mean == "samples" else torch.ones_like(counts)
    centred = means - weighted_mean(means, weights)
    within, between = stats.trace_within, centred.square().sum() / len(means)
    # Below what rounding leaves of means that coincide: of float32 residuals, and of float64 means.
    coincide = between <= 2.0**-44 * within + (2.0**-48 * means.norm(dim=1).max()) ** 2
    centred, between = centred.masked_fill_(coincide, 0.0), between.masked_fill(coincide, 0.0)
    numbers = {"trace_within": within, "trace_between": between, "trace_ratio": within / between}
    distances = means.new_full((len(means),), torch.inf)
    if len(means) > 1:
        geometry = pair_geometry(centred, stats.class_variances[those])
        numbers |= _frame_numbers(centred, geometry, "means")
        distances = geometry.nearest_distance
        numbers["cdnv"] = cast(torch.Tensor, geometry.cdnv)
        numbers["gnc2"] = geometry.log_kernel_std / geometry.log_kernel_mean.abs()
        if stats.scatter is not None:
            numbers["nc1"] = _nc1_by_solving(stats, centred, weights)
    if len(means) > 1 and weight is not None:
        rows = weight.detach()[those].double()
        numbers |= _frame_numbers(rows, pair_geometry(rows), "classifier")
        numbers["nc3_self_duality"] = torch.dist(rows / rows.norm(), centred / centred.norm()).square()
        numbers["etf_error_product"] = etf_error(rows, centred)
        products = (rows * centred).sum(1)
        numbers["unc3"] = _variation(products / rows.norm(dim=1) / centred.norm(dim=1))
    return numbers, centred, distances


def check_global_mean(global_mean: str) -> None:
    """Raise unless it is one of `GLOBAL_MEANS`."""
    if global_mean not in GLOBAL_MEANS:
        raise ValueError(f"global_mean must be one of {', '.join(GLOBAL_MEANS)}, got {global_mean!r}")


def check_classifier(
    weight: torch.Tensor | None, bias: torch.Tensor | None, num_classes: int, dim: int, device: torch.device
) -> None:
    """Raise unless weight [num_classes, dim] and bias [num_classes] are floating, on `device`, and finite.

    The last on the CPU only: elsewhere `collapse_and_distances` looks, when it waits anyway.
    """
    if weight is None and bias is not None:
        raise ValueError("bias was given without weight")
    for tensor, name, shape in ((weight, "weight", (num_classes, dim)), (bias, "bias", (num_classes,))):
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point torch.Tensor")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but the features are on {device}")
        check_in_memory(tensor, name)
    if device.type == "cpu":
        _check_finite(weight, bias)


def _check_finite(weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    for tensor, name in ((weight, "weight"), (bias, "bias")):
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"{name} holds a NaN or an infinity")


def _nc1_by_solving(stats: ClassStatistics, centred: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Tr(Σ_W Σ_B†)/C, where Σ weights_c · centred_c = 0; NaN where that would leave fewer than 8 digits.

    By a Cholesky factor of Σ_B, or where C ≤ p of the Gram matrix of the means, if that has rank C − 1.
    """
    C, p = centred.shape
    frame = centred / math.sqrt(C)  # Σ_B = frameᵀ frame
    if p >= C:
        # M = frame frameᵀ + t w wᵀ, where frameᵀ w = 0: Y = M⁻¹ frame gives Σ_B† = Yᵀ Y.
        matrix = frame @ frame.T
        w = weights.double() / weights.double().norm()
        matrix += matrix.trace() / C * torch.outer(w, w)
    else:
        matrix = frame.T @ frame
    factor, failed = torch.linalg.cholesky_ex(matrix)  # M = L Lᵀ, M⁻¹ = L⁻ᵀ L⁻¹
    identity = torch.eye(len(matrix), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    root = torch.cholesky_solve(frame, factor).T if p >= C else inverse.T  # [p, min(C, p)]
    # No less than the condition number: 1/λ_min ≤ Tr M⁻¹ = ‖L⁻¹‖². (‖root‖² says nothing of a λ_min that is
    # rounding alone: the frame hardly has that direction.)
    condition = inverse.square().sum() * matrix.norm()
    nc1 = stats.within_quadratic(root).sum() / C
    return torch.where((failed == 0) & (condition < 2.0**26), nc1, torch.nan)


def _nc1_by_eigenvalues(stats: ClassStatistics, centred: torch.Tensor) -> torch.Tensor:
    """Tr(Σ_W Σ_B†)/C of any means, by an eigenproblem of size min(C, p); NaN where they coincide."""
    C, p = centred.shape
    frame = centred / math.sqrt(C)
    # Σ_k v_kᵀ Σ_W v_k / λ_k over the eigenpairs (λ_k, v_k) of Σ_B; where C ≤ p the eigenvectors u of the
    # Gram matrix of the means give v = frameᵀ u / √λ.
    if p >= C:
        values, vectors = torch.linalg.eigh(frame @ frame.T)
        vectors = frame.T @ (vectors / values.clamp(min=0.0).sqrt())
    else:
        values, vectors = torch.linalg.eigh(frame.T @ frame)
    # The rounding error of eigh, of the [C, C] problem or of the [p, p] one.
    kept = values > max(C, p) * torch.finfo(torch.float64).eps * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    if len(values) == 0:
        return centred.new_full((), torch.nan)
    return (stats.within_quadratic(vectors) / values).sum() / C


def _frame_numbers(rows: torch.Tensor, geometry: PairGeometry, whose: str) -> dict[str, torch.Tensor]:
    """How far the rows are from a simplex ETF: Figs. 2–4 and the ETF error."""
    return {
        f"nc2_equinorm_{whose}": _variation(rows.norm(dim=1)),
        f"nc2_equiangular_{whose}": geometry.cosine_std,
        f"nc2_max_angle_{whose}": geometry.max_angle_deviation,
        f"etf_error_{whose}": geometry.etf_error,
    }


def _variation(values: torch.Tensor) -> torch.Tensor:
    """The coefficient of variation, Std/|Avg|."""
    return values.std(correction=0) / values.mean().abs()


def _shown(value: float | int | str | None) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
