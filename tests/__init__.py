"""Tests; the folders mirror the packages. A package, so that helpers import as `tests.published`."""
