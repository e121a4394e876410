"""The scores that are compared, under the names that tables show."""

from nnopt.scores import (
    ChannelMean,
    EpeNas,
    Fisher,
    GradNorm,
    Grasp,
    JacobCov,
    L2Norm,
    LayerFisher,
    LogSum,
    Macs,
    MeCo,
    Naswot,
    Parameters,
    Plain,
    Score,
    Snip,
    Swap,
    SynFlow,
    Zen,
    Zico,
)

# The condition number of the neural tangent kernel is left out: it takes a backward run for each image.
SCORES: dict[str, Score] = {
    "synflow": SynFlow(
        log=True
    ),  # a rank correlation does not see the logarithm, a CSV file's reader does
    "naswot": Naswot(),
    "swap": Swap(),
    "jacob_cov": JacobCov(),
    "epe_nas": EpeNas(),
    "zen": Zen(),
    "zico": Zico(),
    "meco": MeCo(),
    "grad_norm": GradNorm(),
    "snip": Snip(),
    "grasp": Grasp(),
    "plain": Plain(),
    "layer_fisher": LayerFisher(),
    "fisher": Fisher(),
    "fisher_log_sum": Fisher(aggregation=LogSum()),
    "fisher_channel_mean": Fisher(aggregation=ChannelMean()),
    "l2_norm": L2Norm(),
    "parameters": Parameters(),
    "macs": Macs(),
}
