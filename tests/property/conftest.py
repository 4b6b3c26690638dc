"""The same examples in every run, so that a change is what makes a test fail.

`HYPOTHESIS_SEARCH=1 make test TESTS=tests/property` looks for new ones.
"""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
if not os.environ.get("HYPOTHESIS_SEARCH"):
    settings.load_profile("repeatable")
