"""Published test metrics, to stand beside measured ones."""

from experiments.config import Config, preset

# HR@1, HR@5, HR@10, NDCG@5, NDCG@10.
_NAMES = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10")

# SEvo-AdamW: mean and standard deviation of the five runs in the official code's logs.
_SEVO = {
    ("gru4rec", "amazon_beauty"): (
        (0.00942, 0.03262, 0.05239, 0.02093, 0.02729),
        (0.00144, 0.00091, 0.00198, 0.00104, 0.00122),
    ),
    ("gru4rec", "amazon_toys"): (
        (0.00803, 0.02763, 0.04463, 0.01791, 0.02337),
        (0.00040, 0.00053, 0.00056, 0.00048, 0.00045),
    ),
    ("gru4rec", "amazon_tools"): (
        (0.00583, 0.02084, 0.03361, 0.01329, 0.01738),
        (0.00034, 0.00145, 0.00199, 0.00078, 0.00081),
    ),
    ("gru4rec", "movielens_1m"): (
        (0.04868, 0.16626, 0.25682, 0.10749, 0.13660),
        (0.00145, 0.00365, 0.00548, 0.00162, 0.00111),
    ),
    ("sasrec", "amazon_beauty"): (
        (0.01537, 0.04988, 0.07587, 0.03279, 0.04113),
        (0.00096, 0.00192, 0.00183, 0.00136, 0.00133),
    ),
    ("sasrec", "amazon_toys"): (
        (0.01917, 0.05839, 0.08435, 0.03917, 0.04751),
        (0.00081, 0.00055, 0.00139, 0.00068, 0.00075),
    ),
    ("sasrec", "amazon_tools"): (
        (0.01078, 0.03372, 0.04971, 0.02225, 0.02739),
        (0.00030, 0.00041, 0.00089, 0.00030, 0.00046),
    ),
    ("sasrec", "movielens_1m"): (
        (0.05172, 0.16695, 0.25666, 0.10958, 0.13845),
        (0.00202, 0.00106, 0.00283, 0.00111, 0.00165),
    ),
}

# The baselines of the paper's Table 2, which are trained with Adam (not AdamW).
_ADAM = {
    ("gru4rec", "amazon_beauty"): (0.0061, 0.0233, 0.0395, 0.0146, 0.0198),
    ("gru4rec", "amazon_toys"): (0.0059, 0.0209, 0.0345, 0.0134, 0.0177),
    ("gru4rec", "amazon_tools"): (0.0053, 0.0174, 0.0272, 0.0114, 0.0145),
    ("gru4rec", "movielens_1m"): (0.0487, 0.1625, 0.2522, 0.1061, 0.1350),
    ("sasrec", "amazon_beauty"): (0.0120, 0.0404, 0.0634, 0.0262, 0.0336),
    ("sasrec", "amazon_toys"): (0.0172, 0.0506, 0.0727, 0.0342, 0.0413),
    ("sasrec", "amazon_tools"): (0.0099, 0.0317, 0.0466, 0.0210, 0.0258),
    ("sasrec", "movielens_1m"): (0.0490, 0.1599, 0.2492, 0.1046, 0.1333),
}


def published(config: Config, dataset: str) -> dict[str, tuple[float, float | None]] | None:
    """Mean and spread of the published metrics of a run, or None where there are none.

    There are some only for the settings of the presets, trained with SEvo-AdamW or Adam.
    """
    key = (config.model, dataset)
    if config != preset(config.model, dataset, config.optimizer):
        return None
    if config.optimizer == "sevo_adamw" and key in _SEVO:
        return dict(zip(_NAMES, zip(*_SEVO[key], strict=True), strict=True))
    if config.optimizer == "adam" and key in _ADAM:
        return {name: (mean, None) for name, mean in zip(_NAMES, _ADAM[key], strict=True)}
    return None
