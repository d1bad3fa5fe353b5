"""pythia-fast: trains the Pythia suite from hand-written Triton kernels.

Read one training step in this order: ``train.py`` (the step), ``config.py``, ``data/``,
``model.py``, ``optim.py``, and the one kernel you care about in ``kernels/``.
"""

__version__ = "0.1.0"
