"""The pure core of Quick-Tune on Kubernetes: no network, no cluster, no clock, no global seed.

Nothing is re-exported here: importing one light module must never pull in torch.
"""

__version__ = "0.1.0"
