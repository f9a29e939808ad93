"""Runnable studies on top of scl_jax."""
