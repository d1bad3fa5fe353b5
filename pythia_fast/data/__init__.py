"""The data path: Megatron ``.bin/.idx`` files (`indexed`), the order in which their tokens become
rows (`order`), batches read ahead of the trainer (`loader`), files made from text (`build`), and
``pythia-fast data``: its functions (`commands`) and its flags (`cli`). Everything here is numpy;
the batch of step s is rows [batch·s, batch·(s+1)), a pure function of the files, the order and the
seed.
"""
