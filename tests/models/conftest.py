"""Examples take as long as a busy machine needs for them."""

from __future__ import annotations

from hypothesis import settings as effort

effort.register_profile("unhurried", deadline=None)
effort.load_profile("unhurried")
