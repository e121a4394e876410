"""nnopt: make neural networks efficient by composable rewrites of Flax networks.

A network is decomposed into its skeleton (widths and depths), its blocks, and its operations. Each has its
rewrites (`nnopt.rewrites`); scores judge a rewritten network without training it (`nnopt.scores`); costs count it
(`nnopt.costs`); backends run and time it (`nnopt.backends`); searches choose among rewrites (`nnopt.search`).
"""

__version__ = "0.1.0"
