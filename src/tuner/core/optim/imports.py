"""Classes by import path, with errors that say what to do."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from typing import Any

from tuner.core.errors import UsageError


def import_class(what: str, module: str, attribute: str, *, where: str, package: str | None = None) -> Any:
    """``module.attribute``; imports its package. what: how errors name it. package: what to install when it is missing,
    the first part of ``module`` by default. where: the key that names it.
    """
    top = module.partition(".")[0]
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise UsageError(f"{what} cannot be imported", where=where, why=f"{module}: {error}") from error
        found = _installed(top)
        raise UsageError(
            f"{what} needs the package {package or top}, which "
            + (f"has no module {module}" if found else "is not installed"),
            where=where,
            fix="check the import path" if found else f"pip install {package or top}",
        ) from error
    except ImportError as error:
        raise UsageError(f"{what} cannot be imported", where=where, why=f"{module}: {error}") from error
    value = getattr(loaded, attribute, None)
    if value is None:
        near = difflib.get_close_matches(attribute, dir(loaded), 1)
        raise UsageError(
            f"the module {module} has no {attribute!r}",
            where=where,
            fix=f"did you mean {module}.{near[0]}?" if near else None,
        )
    return value


def _installed(top: str) -> bool:
    try:
        return importlib.util.find_spec(top) is not None
    except ValueError:  # sys.modules says that it is not to be imported
        return False
