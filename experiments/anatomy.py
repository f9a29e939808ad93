"""What is seen of masks feature by feature: their gradients, their connections."""

import dataclasses
from typing import Any

import jax
import numpy as np

import scl_jax
from experiments.config import Config
from experiments.data import Split
from experiments.feed import each, make_feed
from experiments.mesh import make_mesh
from experiments.methods import METHODS, masks_optimizer
from experiments.models import MODELS
from experiments.network import make_network
from experiments.step import Objective
from scl_jax import MaskedParams
from scl_jax._features import FeatureAxes, reduced_axes
from scl_jax._paths import leaves_by_path

PyTree = Any


def gradient_norms(
    config: Config,
    examples: Split,
    masked: MaskedParams,
    statistics: PyTree,
    *,
    norm: str = "none",
    batches: int = 8,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Measure how strongly the task loss pushes the mask variables of each feature.

    The mask gradient is G * W, with G the gradient of the task loss with respect to
    W * H(S). Measured is its root mean square over a feature's incoming weights, in
    each batch by itself, as the optimizer meets it; then the mean over the batches.
    The penalty has no part in it. The masks are those given for all batches.

    Args:
      config: the experiment; its batch size and straight-through estimator are used.
      examples: the split that the batches are drawn from.
      masked: the network, on its way or trained.
      statistics: of its normalization layers.
      norm: what the gradients are divided by before they are measured: "none", or
        "rms", "l2" or "max", as the config's training does it batch after batch.
      batches: how many; at most those of an epoch.
      seed: which batches.

    Returns:
      Path of each masked kernel -> float64, (features,): nats per unit of the mask
      variable; without a unit where a norm divided.

    Raises:
      ValueError: if the split has fewer batches, or the norm is unknown.

    Source: the method's dJ/dS = (G * W + lambda) * p(S) without lambda. The mean of the
    norms, not the norm of the mean, is our choice: each step divides by its own.
    """
    mesh = make_mesh(config.devices, config.model_parallel)
    feed = make_feed(config, examples, mesh)
    if not 1 <= batches <= feed.steps:
        raise ValueError(
            f"gradient_norms: batches must be from 1 to those of an epoch, "
            f"{feed.steps}; got {batches}"
        )
    feature_axes = MODELS[config.model].feature_axes
    # With a fixed penalty of nothing what is left of the loss is the task's, and with a
    # rate of 1 and nothing behind it a step of the masks is the normalized gradient.
    bare = dataclasses.replace(
        config,
        sparsity=0.0,
        penalty=0.0,
        norm=norm,
        mask_learning_rate=1.0,
        mask_momentum=0.0,
        minimum_connections=0,
        freeze_at=1.0,
    )
    objective = Objective(
        make_network(config), METHODS["scl"](bare, batches), config.label_smoothing
    )
    normalize = masks_optimizer(bare, batches, None)

    @jax.jit
    def measure(state, masked, source, item):
        gradient, _ = jax.grad(objective.loss, has_aux=True)(
            masked, statistics, feed.batch(source, item)
        )
        steps, state = normalize.update(gradient.masks, state, masked.masks)
        seen = scl_jax.mask_statistics(
            masked, gradient=steps, feature_axes=feature_axes
        )
        return state, seen.gradient_norm

    key = jax.random.key_data(jax.random.key(seed))
    state, total = normalize.init(masked.masks), {}
    for item in each(feed.items(seed, key, 0, 0, batches)):
        state, norms = measure(state, masked, feed.source, item)
        for path, x in leaves_by_path(norms).items():
            if x is not None:
                total[path] = total.get(path, 0) + np.ravel(x).astype(np.float64)
    return {path: x / batches for path, x in total.items()}


def connections_per_feature(
    masked: MaskedParams, feature_axes: FeatureAxes = -1
) -> dict[str, np.ndarray]:
    """Count the connections that lead into each feature.

    Args:
      masked: what `scl_jax.mask_params` made; concrete arrays.
      feature_axes: as in `scl_jax.normalize_by_feature`.

    Returns:
      Path of each masked kernel -> int64, (features,).

    Raises:
      TypeError, ValueError: as `scl_jax.binary_masks`, and where feature axes do not
        fit.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[0.1, 0.1, -0.1], [0.1, -0.1, -0.1]])
      >>> masked = MaskedParams({"kernel": jnp.ones((2, 3))}, {"kernel": kernel})
      >>> connections_per_feature(masked)["kernel"].tolist()
      [2, 1, 0]
    """
    variables = leaves_by_path(masked.masks)
    counts = {}
    for path, mask in leaves_by_path(scl_jax.binary_masks(masked)).items():
        if mask is not None:
            axes = reduced_axes(
                feature_axes, path, variables[path], "connections_per_feature"
            )
            counts[path] = np.ravel(np.sum(np.asarray(mask), axes, dtype=np.int64))
    return counts


def decades(values: np.ndarray) -> float:
    """Return the spread of positive numbers, in powers of ten.

    Args:
      values: any shape; zeros are left out, for they have no order of magnitude.

    Returns:
      log10 of the 90th over the 10th percentile; 0 where all are alike.

    Raises:
      ValueError: if a number is negative or not finite, or none is positive.

    Example:
      >>> decades(np.array([1.0] * 10 + [0.0] * 50 + [1000.0] * 10))
      3.0
    """
    values = np.asarray(values, np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all() and (values > 0).any()):
        raise ValueError(
            "decades: needs finite numbers that are not negative, and one above 0; got "
            f"{values.size} from {values.min(initial=np.inf)} to "
            f"{values.max(initial=-np.inf)}"
        )
    low, high = np.quantile(values[values > 0], [0.1, 0.9])
    return float(np.log10(high / low))
