"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# Hypothesis ends an example after 200 ms otherwise: an assertion on how busy the machine is.
settings.register_profile("without-deadlines", deadline=None)
settings.load_profile("without-deadlines")
