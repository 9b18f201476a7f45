"""AXL's functions of linear algebra and of the normal distribution, over NumPy."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()


def standard_normal_pdf(x: float) -> float:
    """Returns the density of the standard normal distribution."""
    return _NORMAL.pdf(x)


def standard_normal_cdf(x: float) -> float:
    """Returns the probability that a standard normal number is at most ``x``."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


@functools.lru_cache(maxsize=1024)
def inverse_standard_normal_cdf(probability: float) -> float:
    """Returns the number that a standard normal one is at most with this probability."""
    if not 0.0 < probability < 1.0:
        raise ValueError(f"Probability must be in (0, 1), found {probability}")
    return _NORMAL.inv_cdf(probability)


def svd_keys_values(
    weight_matrix: np.ndarray, energy_keep: float = 1.0, min_sigma: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns ``U [out, r]``, ``S [r]``, ``V [in, r]`` and the keys ``S · Vᵀ [r, in]`` of a weight ``[out, in]``: as many components as have
    the share ``energy_keep`` of the squares of singular values, and none below ``min_sigma``."""
    if not 0.0 < energy_keep <= 1.0:
        raise ValueError(f"energy_keep must be in (0.0, 1.0], found {energy_keep}")
    if min_sigma < 0:
        raise ValueError(f"min_sigma must be non-negative, found {min_sigma}")
    u, s, vt = np.linalg.svd(np.asarray(weight_matrix, np.float32), full_matrices=False)
    energy = np.cumsum(s.astype(np.float64) ** 2)
    kept = int(np.searchsorted(energy / max(energy[-1], np.finfo(float).tiny), energy_keep, side="right")) + 1
    rank = min(kept, len(s), int(np.sum(s >= min_sigma)))
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    return u, s, vt.T, s[:, None] * vt


def estimate_covariance(
    calibration_data: np.ndarray | None, feature_dim: int, ridge: float = 1e-6
) -> np.ndarray:
    """Returns the covariance ``[feature_dim, feature_dim]`` of inputs, a ridge on its diagonal; of no inputs, the identity with it."""
    if feature_dim <= 0:
        raise ValueError(f"feature_dim must be positive, found {feature_dim}")
    if ridge < 0:
        raise ValueError(f"ridge must be non-negative, found {ridge}")
    eye = np.eye(feature_dim, dtype=np.float32)
    if calibration_data is None:
        return eye + ridge * eye
    data = np.asarray(calibration_data, np.float32)
    if data.ndim != 2 or data.shape[1] != feature_dim:
        raise ValueError(f"Calibration data must have {feature_dim} features, found shape {data.shape}")
    centred = data - data.mean(0)
    return (centred.T @ centred / max(len(data) - 1, 1) + ridge * eye).astype(np.float32)


def whiten_standardize_keys(
    key_matrix: np.ndarray, covariance_matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ``L⁻¹ [d, d]``, the keys as they meet whitened inputs ``L⁻¹ x``, at length 1, and their lengths before.

    With covariance ``L Lᵀ`` a whitened key is ``Lᵀ k``, so that its product with a whitened input is that of key and input. AXL multiplies by
    ``L⁻¹``, which does not keep the product.
    """
    keys, covariance = np.asarray(key_matrix, np.float32), np.asarray(covariance_matrix, np.float32)
    if covariance.ndim != 2 or covariance.shape != (keys.shape[-1],) * 2:
        raise ValueError(f"Covariance matrix must be square and match key dimension {keys.shape[-1]}, found {covariance.shape}")
    try:
        lower = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        least = float(np.linalg.eigvalsh(covariance).min())
        lower = np.linalg.cholesky(covariance + (abs(least) + 1e-6) * np.eye(len(covariance), dtype=np.float32))
    whitened = keys @ lower
    scales = np.linalg.norm(whitened, axis=1)
    scales = np.where(scales > 0, scales, 1.0).astype(np.float32)
    return np.linalg.inv(lower).astype(np.float32), whitened / scales[:, None], scales


def compute_search_threshold(expected_keys: int, total_keys: int, method: str = "quantile") -> float:
    """Returns a threshold on the scores of unit keys, standard normal, that about ``expected_keys`` of ``total_keys`` reach."""
    if total_keys <= 0 or expected_keys < 0:
        raise ValueError(f"Keys: found {expected_keys} expected of {total_keys}, expected 0 or more of 1 or more")
    if expected_keys > total_keys:
        raise ValueError(f"Expected keys cannot exceed total keys, found {expected_keys} of {total_keys}")
    share = expected_keys / total_keys
    if method == "quantile":
        return inverse_standard_normal_cdf(min(max(1.0 - share, 1e-12), 1.0 - 1e-12))
    if method == "fixed":
        return 0.5
    if method == "adaptive":
        return min(max(share, 0.1), 0.9)
    raise ValueError(f"Unknown method: {method}")


def validate_tensor(
    tensor: np.ndarray, expected_shape: tuple[int, ...] | None = None, dtype: np.dtype | None = None
) -> np.ndarray:
    """Returns an array whose shape was checked, converted to ``dtype`` where that is given."""
    if not isinstance(tensor, np.ndarray):
        raise ValueError(f"Input must be a numpy array, found {type(tensor).__name__}")
    if expected_shape is not None and tensor.shape != tuple(expected_shape):
        raise ValueError(f"Expected shape {expected_shape}, got {tensor.shape}")
    return tensor if dtype is None else tensor.astype(dtype)


def safe_matrix_inverse(matrix: np.ndarray, ridge: float = 1e-6) -> np.ndarray:
    """Returns the inverse of a matrix; of a singular one, with a ridge on its diagonal."""
    matrix = np.asarray(matrix, np.float64)
    try:
        inverse = np.linalg.inv(matrix)
    except np.linalg.LinAlgError:
        inverse = np.linalg.inv(matrix + ridge * np.eye(len(matrix)))
    return inverse.astype(np.float32)
