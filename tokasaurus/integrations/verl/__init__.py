"""veRL's rollout ``tokasaurus``: veRL generates with running engines, and with cartridges.

veRL finds it by the entry point ``verl.plugins`` from 0.9 on, and by
``VERL_USE_EXTERNAL_MODULES=tokasaurus.integrations.verl`` in every version. docs/verl.md has more.

Importing this package imports neither veRL nor Ray, unless veRL imports it.
"""

import sys

if "verl" in sys.modules:  # veRL asks for it, or was imported before: register
    from tokasaurus.integrations.verl import plugin  # noqa: F401
