# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The scope `mmdcnv4` of mmengine's registries, for configs inherited by `mmdcnv4::folder/name.py`.

mmengine builds everything that a config inherits from another package in that package's scope, and
imports `<package>.registry` for it. The recipes of this package consist of classes of mmdet, mmseg
or mmdet3d, so that its scope stands for the one around it, which is the config's `default_scope`.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any, Optional

from mmengine import registry as roots
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DefaultScope, Registry

SCOPE = 'mmdcnv4'
HOSTS = ('mmdet', 'mmseg', 'mmdet3d', 'mmpretrain')

# mmengine reads `mmdcnv4::...` only of packages in this table, and looks for `.mim` beside the file
# of the module that it names. The name of the distribution would not do: where an editable
# installation keeps its metadata there is no package.
MODULE2PACKAGE.setdefault(SCOPE, f'{SCOPE}.version')


def _scope_around() -> Optional[str]:
    """The default scope that was in force before mmengine switched to ours."""
    names = [scope.scope_name for scope in DefaultScope._instance_dict.values()]
    return next((name for name in reversed(names) if name != SCOPE), None)


class _HostScope(Registry):
    """Finds what the scope around finds, or else what one library alone has.

    Registers nothing: the classes of this package are in the root registries.
    """

    def get(self, key: str) -> Any:
        """The class of a type name, or None.

        Raises:
            KeyError: several libraries have a class of this name, and no scope says which is meant.
        """
        if self.split_scope_key(key)[0] not in (None, SCOPE):
            return self.parent.get(key)
        name = self.split_scope_key(key)[1]
        scope = _scope_around()
        found = None if scope is None else self._find(scope, name)
        return self._search(name) if found is None else found

    def _find(self, scope: str, name: str) -> Any:
        return self.parent.get(f'{scope}.{name}')

    def _search(self, name: str) -> Any:
        """The class that only one of the installed libraries has; its scope is then in force."""
        found = {host: self._find(host, name) for host in HOSTS
                 if importlib.util.find_spec(host) is not None}
        found = {host: value for host, value in found.items() if value is not None}
        if len(set(found.values())) > 1:
            raise KeyError(
                f'{name} is a class of {", ".join(found)}; say which is meant, with '
                'mmengine.registry.init_default_scope(cfg.default_scope) before the config is used')
        current = DefaultScope.get_current_instance()
        if len(found) == 1 and current is not None and current.scope_name == SCOPE:
            # what is inside that class belongs to the same library; mmengine ends this scope
            # together with ours
            (host,) = found
            DefaultScope.get_instance(f'{SCOPE}-{time.time_ns()}', scope_name=host)
        return next(iter(found.values()), None) or self.parent.get(name)


REGISTRIES = tuple(_HostScope(root.name, parent=root, scope=SCOPE)
                   for root in (getattr(roots, name) for name in roots.__all__)
                   if isinstance(root, Registry))
