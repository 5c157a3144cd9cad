"""The registered operators' arguments, by name."""

NOTHING = {"softcap": 0.0, "margin": 0.0, "pool": "", "symmetric": False, "invariant": False}  # else None
USUAL = {"rank": True, "workspace_bytes": 1 << 20}


def arguments(operator, **given):
    """In the operator's order: those given, and for each other what asks for nothing."""
    names = [argument.name for argument in operator._opoverload._schema.arguments]
    assert given.keys() <= set(names), f"{operator} has no {given.keys() - set(names)}"
    return tuple((NOTHING | USUAL | given).get(name) for name in names)


def need(*names):
    """Which gradients are asked."""
    return [name in names for name in ("x", "w", "bias", "x2", "w2", "scale")]
