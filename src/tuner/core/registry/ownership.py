"""Every hook has its one owner: checked when a run opens, because pluggy itself would take the last one silently."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import pluggy

from tuner.core import hooks as specifications
from tuner.core.errors import Problems, UsageError
from tuner.core.hooks import DEFAULT_HOOKS, MODEL_HOOKS, PROJECT, RUN_HOOKS
from tuner.core.registry import defaults

HOOKS = (*MODEL_HOOKS, *DEFAULT_HOOKS, *RUN_HOOKS)
CORE = "core"


def new_manager(model: tuple[str, ModuleType], extensions: Mapping[str, ModuleType]) -> pluggy.PluginManager:
    """A manager of its own for one run: specifications, the core's defaults, one model, extensions outermost first.

    model and extensions are named as messages name them: ``plugin 'x' 0.3``. Raises one UsageError with all problems.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specifications)
    manager.register(defaults, name=CORE)
    problems = Problems()
    # pluggy calls the plugin registered last first, so the first listed extension is the outermost wrapper.
    for title, module in [model, *reversed(list(extensions.items()))]:
        problems.extend(_name_problems(manager, title, module, is_model=title == model[0]))
        try:
            manager.register(module, name=title)
        except pluggy.PluginValidationError as error:
            problems.add(_misfit(title, error))
    problems.raise_if_any()
    problems.extend(_owner_problems(manager, model[0]))
    problems.raise_if_any()
    manager.check_pending()
    return manager


def hook_problems(title: str, module: ModuleType, *, is_model: bool) -> list[UsageError]:
    """Everything wrong with the hooks of one plugin that can be seen without a run."""
    if is_model:
        try:
            new_manager((title, module), {})
        except UsageError as problem:
            return [problem]
        return []
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specifications)
    problems = _name_problems(manager, title, module, is_model=False)
    try:
        manager.register(module, name=title)
    except pluggy.PluginValidationError as error:
        problems.append(_misfit(title, error))
    return problems


def _misfit(title: str, error: pluggy.PluginValidationError) -> UsageError:
    reason = str(error).splitlines()[-1].strip()
    return UsageError(f"{title}: a hook does not fit its specification", why=reason, fix="see the hook reference")


def _name_problems(
    manager: pluggy.PluginManager, title: str, module: ModuleType, *, is_model: bool
) -> list[UsageError]:
    """Misspelt hooks, old-style wrappers, and extensions that would replace what belongs to the model."""
    found = []
    for name in dir(module):
        options: Any = manager.parse_hookimpl_opts(module, name)
        if options is None:
            continue
        hook = options.get("specname") or name
        if hook not in HOOKS:
            if not options.get("optionalhook"):
                guess = get_close_matches(hook, HOOKS, n=1)
                fix = f"did you mean {guess[0]!r}?" if guess else f"hooks: {', '.join(HOOKS)}"
                found.append(UsageError(f"{title}: there is no hook {hook!r}", fix=fix))
        elif options.get("hookwrapper"):
            found.append(
                UsageError(
                    f"{title}, hook {hook}: old-style wrappers are refused",
                    why="exceptions do not reach them",
                    fix="use @hookimpl(wrapper=True) and return the value of yield",
                )
            )
        elif not is_model and hook not in RUN_HOOKS and not options.get("wrapper"):
            found.append(
                UsageError(
                    f"{title}, hook {hook}: an extension may only wrap it",
                    why="a plain implementation would replace the model's",
                    fix="use @hookimpl(wrapper=True)",
                )
            )
    return found


def _owner_problems(manager: pluggy.PluginManager, model: str) -> list[UsageError]:
    found = []
    for name in (*MODEL_HOOKS, *DEFAULT_HOOKS):
        impls = getattr(manager.hook, name).get_hookimpls()
        owners = [impl.plugin_name for impl in impls if not impl.wrapper]
        allowed = [[model]] if name in MODEL_HOOKS else [[CORE], [CORE, model]]
        if owners in allowed:
            continue
        if model not in owners and name in MODEL_HOOKS:
            fix = f"write {name} in its hooks module, with @hookimpl"
            found.append(UsageError(f"{model} does not implement the hook {name}", fix=fix))
        else:
            listed = ", ".join(owners)
            found.append(UsageError(f"the hook {name} has several implementations", why=f"from {listed}"))
    return found
