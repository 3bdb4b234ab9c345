"""Counts what a rank computes."""

from hf_noneuclid import norms
from hf_noneuclid.polar import polar_flops


class Flops:
    """Counts the operations of the polar factors that this rank computes."""

    def __init__(self):
        self.count, self._polar_factors = 0, norms.polar_factors

    def __enter__(self):
        norms.polar_factors = self
        return self

    def __exit__(self, *error):
        norms.polar_factors = self._polar_factors

    def __call__(self, batches, *, steps, **options):
        self.count += sum(len(m) * polar_flops(*m.shape[1:], steps) for m in batches)
        return self._polar_factors(batches, steps=steps, **options)
