"""Counts what a rank computes."""

from hf_noneuclid import norms
from hf_noneuclid.polar import polar_flops


class Flops:
    """Counts the operations of the polar factors that this rank computes."""

    def __init__(self):
        self.count, self._polar_factor = 0, norms.polar_factor

    def __enter__(self):
        norms.polar_factor = self
        return self

    def __exit__(self, *error):
        norms.polar_factor = self._polar_factor

    def __call__(self, m, *, steps, **options):
        self.count += m.shape[0] * polar_flops(*m.shape[1:], steps)
        return self._polar_factor(m, steps=steps, **options)
