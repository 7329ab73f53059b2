"""Registers the checkpoint format with diffusers when diffusers is imported: who needs no model loads neither it nor torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLES = "diffusers.quantizers.auto"
"""The module of diffusers with the tables of quantizers."""
PLUGIN = "reelquant.diffusers_plugin"
"""The module that registers when it is imported."""


def register() -> None:
    """Makes the checkpoint format known to diffusers; calling it again changes nothing."""
    from reelquant.diffusers_plugin import register as enter

    enter()


def register_when_imported() -> None:
    """Registers now if diffusers has its tables of quantizers, otherwise as soon as it has."""
    if TABLES in sys.modules:
        import_module(PLUGIN)
    else:
        sys.meta_path.insert(0, _AfterTables())


class _AfterTables(MetaPathFinder, Loader):
    """Loads the module `TABLES` as Python would, and the plugin after it, before whoever imports the tables goes on. At its top
    the plugin may import those parts of diffusers alone that the tables import too."""

    _loader: Loader

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's specification, with this object as its loader; None for other modules."""
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does it."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader does it, then registers. A plugin that imports the tables itself is half imported now, and
        registers at its end."""
        self._loader.exec_module(module)
        import_module(PLUGIN)
