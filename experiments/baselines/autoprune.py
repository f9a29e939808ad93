"""The baseline that regularizes auxiliary parameters: AutoPrune."""

import jax
import jax.numpy as jnp
import optax

import scl_jax
from experiments.config import Config, parse_ste
from experiments.method import Method, freeze_step, weights_optimizer


def autoprune(config: Config, steps: int) -> Method:
    """Train masks by the gradient of the loss and the signs of the weights.

    From Xiao, Wang & Rajasekaran, "AutoPrune: automatic network pruning by
    regularizing auxiliary parameters", NeurIPS 2019. With t = w * h(m), h the unit step
    of an auxiliary parameter m, here the mask variable, and p the gradient of the
    straight-through estimator, `config.ste`:

        gradient of w:  dL/dt * h(m)
        gradient of m:  dL/dt * sgn(w) * p(m) + config.penalty * p(m)

    so that, unlike in SCL, no m moves the faster for the size of its weight. The
    gradients of m are not normalized, and a pruned weight can come back. The source
    advises against the linear estimator, the config's default, and for leaky ReLU or
    softplus.

    Of the source only the abstract and a review were at hand: the formulas are not
    checked against its text, and where m starts, `config.mask_initial` everywhere, is
    our choice.

    Differs in that both w and m are trained on the training loss in the same step,
    where the source alternates between w on training data and m on validation data;
    and in that the masks rest from `config.freeze_at` on.

    Sparsity cannot be asked for: `config.sparsity` is ignored. It follows from
    `config.penalty`, per connection whatever `config.costs` says. No kernel is
    promised a connection.
    """
    ste = parse_ste(config.ste)

    def product(mask, weight):
        if mask is None:
            return weight
        h = scl_jax.unit_step(mask, ste).astype(weight.dtype)
        fixed = jax.lax.stop_gradient(h)
        # The second term is 0; it has the gradient of m, and the first that of w.
        return weight * fixed + jnp.sign(weight) * (h - fixed)

    def effective(masked):
        return jax.tree.map(
            product, masked.masks, masked.weights, is_leaf=lambda x: x is None
        )

    rate = optax.piecewise_constant_schedule(
        config.mask_learning_rate, {freeze_step(config, steps): 0.0}
    )
    transforms = (
        weights_optimizer(config, steps),
        optax.sgd(rate, config.mask_momentum or None),
    )
    return Method(
        name="autoprune",
        wrap=lambda params: scl_jax.mask_params(
            params, initial=config.mask_initial, dtype=jnp.dtype(config.mask_dtype)
        ),
        effective=effective,
        penalty=lambda masked: (
            config.penalty * scl_jax.connection_count(masked, ste=ste)
        ),
        fold=scl_jax.fold_masks,
        tx=scl_jax.partition(*transforms),
        freeze_step=freeze_step(config, steps),
        frozen_tx=scl_jax.partition(*transforms, frozen=True),
    )
