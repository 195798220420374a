"""Names of modules and parameters as in the plain model: wrappers such as ``torch.compile`` add nothing to them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_HELD = ("_orig_mod", "_checkpoint_wrapped_module")  # under which torch.compile and checkpointing hold the plain module
WRAPPERS = ("module", *_HELD)  # what wrappers put into the names of parameters; "module" is that of DataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model inside ``torch.compile``, ``nn.DataParallel`` and the like; any other model as it is."""
    *_, plain = wrapper_chain(model)
    return plain


def wrapper_chain(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what it wraps, what that wraps, and so on; the plain model is the last."""
    yield model
    while (name := _held(model)) is not None:
        model = model._modules[name]
        yield model


def _held(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the module that it passes its calls on to; None if it is no wrapper."""
    if not isinstance(module, nn.Module):
        return None
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return next((name for name in _HELD if name in module._modules), None)


def modules_of(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name that it has in the plain model: wrappers add nothing to the names."""
    yield name, model
    held = _held(model)
    for key, module in model._modules.items():
        if module is not None:
            yield from modules_of(module, name if key == held else dotted(name, key))


def dotted(module: str, name: str) -> str:
    """The name of what is called so inside a module; the model's own name is empty."""
    return f"{module}.{name}" if module else name


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """By every name that a parameter has in the plain model (see :func:`modules_of`): a tied one has several."""
    own = ((name, module._parameters.items()) for name, module in modules_of(model))
    return {dotted(name, key): p for name, items in own for key, p in items if p is not None}


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """The first of the names of every parameter."""
    names: dict[nn.Parameter, str] = {}
    for name, p in parameters_of(model).items():
        names.setdefault(p, name)
    return names
