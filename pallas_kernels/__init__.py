"""Kernels that know no model: one folder each, with api (dispatch), reference (the specification) and backends."""
