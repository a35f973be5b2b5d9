"""Print, one a line, what must be installed to build without isolation.

First ``build-system.requires`` of pyproject.toml; once those are installed, also what
scikit-build-core asks for on this machine (cmake and ninja, unless the system's will do).
"""

import importlib.util
import tomllib
from pathlib import Path

for requirement in tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["requires"]:
    print(requirement)
if importlib.util.find_spec("scikit_build_core"):
    from scikit_build_core.build import get_requires_for_build_editable

    for requirement in get_requires_for_build_editable():
        print(requirement)
