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

# The official code's five runs of SEvo-AdamW at some epochs: mean training loss, and the
# lowest and highest validation NDCG@10 (no validation after the first epoch).
CURVES: dict[tuple[str, str], dict[int, tuple[float, float | None, float | None]]] = {
    ("gru4rec", "amazon_beauty"): {
        1: (0.5563, None, None),
        5: (0.3580, 0.0123, 0.0134),
        10: (0.2741, 0.0184, 0.0196),
        20: (0.2056, 0.0211, 0.0229),
        40: (0.1528, 0.0236, 0.0254),
        100: (0.1118, 0.0287, 0.0303),
        200: (0.0944, 0.0317, 0.0337),
        300: (0.0872, 0.0316, 0.0350),
    },
    ("gru4rec", "amazon_tools"): {
        1: (0.6033, None, None),
        5: (0.3412, 0.0094, 0.0121),
        10: (0.2561, 0.0114, 0.0132),
        20: (0.2026, 0.0115, 0.0141),
        40: (0.1746, 0.0122, 0.0156),
        100: (0.1526, 0.0154, 0.0175),
        200: (0.1438, 0.0187, 0.0192),
        300: (0.1380, 0.0179, 0.0200),
    },
    ("gru4rec", "amazon_toys"): {
        1: (0.5934, None, None),
        5: (0.3790, 0.0074, 0.0089),
        10: (0.2844, 0.0113, 0.0128),
        20: (0.2095, 0.0139, 0.0159),
        40: (0.1518, 0.0175, 0.0187),
        100: (0.1059, 0.0207, 0.0232),
        200: (0.0882, 0.0246, 0.0262),
        300: (0.0801, 0.0277, 0.0290),
    },
    ("sasrec", "amazon_beauty"): {
        1: (1.3497, None, None),
        5: (1.0173, 0.0125, 0.0149),
        10: (0.8511, 0.0191, 0.0202),
        20: (0.6385, 0.0320, 0.0334),
        40: (0.4026, 0.0403, 0.0432),
        100: (0.2228, 0.0477, 0.0491),
        200: (0.1785, 0.0506, 0.0521),
    },
    ("sasrec", "amazon_tools"): {
        1: (1.3862, None, None),
        5: (1.2473, 0.0090, 0.0109),
        10: (1.1797, 0.0131, 0.0139),
        20: (1.0185, 0.0161, 0.0169),
        40: (0.8397, 0.0187, 0.0201),
        100: (0.6202, 0.0270, 0.0280),
        200: (0.5387, 0.0297, 0.0307),
    },
    ("sasrec", "amazon_toys"): {
        1: (1.3697, None, None),
        5: (1.0777, 0.0143, 0.0164),
        10: (0.8707, 0.0226, 0.0252),
        20: (0.6406, 0.0316, 0.0331),
        40: (0.4067, 0.0442, 0.0458),
        100: (0.2150, 0.0536, 0.0546),
        200: (0.1664, 0.0551, 0.0565),
    },
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
