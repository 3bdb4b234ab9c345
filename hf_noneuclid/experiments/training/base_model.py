"""The old place of ``describe_base``: goes when publishing no longer imports it from here."""

from hf_noneuclid.experiments.training.arguments import describe_base as describe_base
