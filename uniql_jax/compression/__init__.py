"""One pass over a model: sort, plan, rotate, refit, quantize, as functions on a stream of layers."""
