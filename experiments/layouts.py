"""How a training's state lies in memory: as the compiler wants it, from call to call.

JAX puts the last axis of an array innermost. A compiler may want it otherwise, as cuDNN
wants the kernels of convolutions, and then transposes the whole state when a function
is called, and back when it returns: weights, mask variables, and all that optimizers
keep of either. Here it is asked how, and the state stays like that.

Source: docs.jax.dev/en/latest/notebooks/layout.html.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from experiments.mesh import by_shape

PyTree = Any


def compile_laid_out(
    function: Callable[..., tuple[PyTree, Any]], mesh: Mesh, state: PyTree, *others: Any
) -> jax.stages.Compiled:
    """Compile a function (state, *others) -> (state, result); it takes state's buffers.

    Args:
      function: what is compiled; the state that it returns has the shapes of the first.
      mesh: where the state lies, as `by_shape` says.
      state: arrays, or their shapes.
      others: arrays, or their shapes.
    """
    ours = jax.tree.map(lambda x: Format(Layout.AUTO, x), by_shape(mesh, state))
    jitted = jax.jit(
        function,
        donate_argnums=0,
        in_shardings=(ours, *[None] * len(others)),
        out_shardings=(ours, None),
    )
    return jitted.lower(jax.tree.map(_shape, state), *others).compile()


def laid_out(
    function: Callable[..., tuple[PyTree, Any]], mesh: Mesh
) -> Callable[..., tuple[jax.stages.Compiled, PyTree]]:
    """Return what makes a function and a state ready for each other.

    Returns:
      A function (state, *others) -> (compiled, state): the function compiled for
      arguments of these shapes, once, and the state as it wants it, whose buffers are
      taken where it lies otherwise. What `compiled` returns it takes again.
    """
    compiled: dict[Any, jax.stages.Compiled] = {}

    def ready(state, *others):
        key = tuple(x.shape for x in jax.tree.leaves((state, others)))
        if key not in compiled:
            compiled[key] = compile_laid_out(function, mesh, state, *others)
        wanted = compiled[key].input_formats[0][0]
        return compiled[key], jax.tree.map(_laid, state, wanted)

    return ready


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    # Without the layout and the sharding of an array, which are not asked for.
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _laid(x: Any, wanted: Format) -> jax.Array:
    """Lay an array out as it is wanted; it is gone if it was not so yet."""
    if x.format.layout == wanted.layout:
        return x
    laid = jax.device_put(x, Format(wanted.layout, x.sharding))
    x.delete()  # as what is donated is: the state is not in memory twice
    return laid
