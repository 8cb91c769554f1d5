"""What a traced program does, for tests that look at it."""

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(program):
    """All equations of a jaxpr, those of the functions, loops and branches in it too."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from equations(inner)


def trace(function, *args):
    """The equations of a function of any arguments."""
    arrays, rest = eqx.partition(args, eqx.is_array)
    return list(
        equations(
            jax.make_jaxpr(lambda x: eqx.filter(function(*eqx.combine(x, rest)), eqx.is_array))(
                arrays
            )
        )
    )


def largest_array(program):
    """The number of elements of the largest array that any of the equations makes."""
    return max(x.aval.size for equation in program for x in equation.outvars)


def site_paths(program, scope=()):
    """The path of each site in a program, such as "decoder.layers.0.self_attention.queries"."""
    for equation in getattr(program, "jaxpr", program).eqns:
        here = (*scope, *filter(None, str(equation.source_info.name_stack).split("/")))
        if equation.primitive.name == "name":
            yield ".".join((*here, equation.params["name"]))
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from site_paths(inner, here)
