"""Set up JAX and hypothesis for the whole run, before any computation."""

import hypothesis
import jax

# Shardings are tested on eight virtual devices. Nothing may compute before this.
jax.config.update("jax_num_cpu_devices", 8)
# A silently broadcast (n,) against (m, n) is a bug until proven otherwise.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "scl_jax", max_examples=25, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("scl_jax")
