"""Set up JAX and hypothesis for the whole run, before any computation."""

import os

import hypothesis
import jax

# Tests compile far more than they compute. Without LLVM's optimizations, not XLA's own,
# they take three quarters of the time; with XLA_FLAGS= they are compiled as for users.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Shardings are tested on eight virtual devices. Nothing may compute before this.
jax.config.update("jax_num_cpu_devices", 8)
# A silently broadcast (n,) against (m, n) is a bug until proven otherwise.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "scl_jax", max_examples=25, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("scl_jax")
