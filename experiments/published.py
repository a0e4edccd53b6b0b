"""Published test metrics, to stand beside measured ones."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from experiments.config import Config
from experiments.presets import known_name, preset

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
    ("mf", "amazon_beauty"): (
        (0.00761, 0.02932, 0.04801, 0.01842, 0.02443),
        (0.00047, 0.00111, 0.00057, 0.00083, 0.00061),
    ),
    ("mf", "amazon_toys"): (
        (0.00989, 0.03059, 0.04768, 0.02030, 0.02579),
        (0.00022, 0.00073, 0.00060, 0.00031, 0.00027),
    ),
    ("mf", "amazon_tools"): (
        (0.00708, 0.02247, 0.03482, 0.01474, 0.01871),
        (0.00034, 0.00063, 0.00107, 0.00038, 0.00047),
    ),
    ("mf", "movielens_1m"): (
        (0.01348, 0.05050, 0.08758, 0.03187, 0.04371),
        (0.00098, 0.00154, 0.00183, 0.00090, 0.00054),
    ),
    ("bert4rec", "amazon_beauty"): (
        (0.01721, 0.05221, 0.07723, 0.03497, 0.04303),
        (0.00063, 0.00056, 0.00080, 0.00045, 0.00054),
    ),
    ("bert4rec", "amazon_toys"): (
        (0.01748, 0.04917, 0.07233, 0.03360, 0.04103),
        (0.00074, 0.00080, 0.00193, 0.00060, 0.00083),
    ),
    ("bert4rec", "amazon_tools"): (
        (0.00870, 0.02795, 0.04412, 0.01833, 0.02352),
        (0.00054, 0.00061, 0.00135, 0.00058, 0.00083),
    ),
    ("bert4rec", "movielens_1m"): (
        (0.07334, 0.21265, 0.30752, 0.14371, 0.17430),
        (0.00300, 0.00154, 0.00271, 0.00184, 0.00209),
    ),
    ("stosa", "amazon_beauty"): (
        (0.02157, 0.05438, 0.07745, 0.03828, 0.04568),
        (0.00055, 0.00074, 0.00153, 0.00055, 0.00069),
    ),
    ("stosa", "amazon_toys"): (
        (0.02675, 0.06254, 0.08717, 0.04527, 0.05318),
        (0.00062, 0.00125, 0.00048, 0.00078, 0.00048),
    ),
    ("stosa", "amazon_tools"): (
        (0.01328, 0.03503, 0.05021, 0.02438, 0.02926),
        (0.00033, 0.00054, 0.00123, 0.00029, 0.00048),
    ),
    ("stosa", "movielens_1m"): (
        (0.05099, 0.15692, 0.23560, 0.10412, 0.12947),
        (0.00171, 0.00318, 0.00196, 0.00226, 0.00160),
    ),
}

# MF-BPR with SEvo-AdamW over users and items together, `--graph users_items`: the logs have it,
# the paper's table has not. Its beta, then the same metrics.
_USERS_ITEMS = {
    ("mf", "amazon_beauty"): (
        0.99,
        (0.00712, 0.02811, 0.04610, 0.01747, 0.02326),
        (0.00036, 0.00050, 0.00073, 0.00021, 0.00011),
    ),
    ("mf", "amazon_toys"): (
        0.7,
        (0.00838, 0.02880, 0.04469, 0.01866, 0.02376),
        (0.00031, 0.00022, 0.00082, 0.00021, 0.00038),
    ),
    ("mf", "amazon_tools"): (
        0.7,
        (0.00678, 0.02163, 0.03417, 0.01421, 0.01823),
        (0.00035, 0.00084, 0.00099, 0.00051, 0.00046),
    ),
    ("mf", "movielens_1m"): (
        0.7,
        (0.01255, 0.05010, 0.08675, 0.03129, 0.04302),
        (0.00080, 0.00116, 0.00217, 0.00088, 0.00129),
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
    ("bert4rec", "amazon_beauty"): (0.0157, 0.0479, 0.0716, 0.0319, 0.0395),
    ("bert4rec", "amazon_tools"): (0.0074, 0.0244, 0.0405, 0.0159, 0.0211),
    ("bert4rec", "amazon_toys"): (0.0160, 0.0430, 0.0645, 0.0297, 0.0366),
    ("bert4rec", "movielens_1m"): (0.0681, 0.2069, 0.3018, 0.1387, 0.1693),
    ("lightgcn", "amazon_beauty"): (0.0074, 0.0289, 0.0472, 0.0181, 0.0240),
    ("lightgcn", "amazon_tools"): (0.0067, 0.0212, 0.0326, 0.0140, 0.0176),
    ("lightgcn", "amazon_toys"): (0.0087, 0.0279, 0.0456, 0.0183, 0.0240),
    ("lightgcn", "movielens_1m"): (0.0124, 0.0495, 0.0866, 0.0307, 0.0427),
    ("mf", "amazon_beauty"): (0.0071, 0.0272, 0.0454, 0.0170, 0.0228),
    ("mf", "amazon_tools"): (0.0058, 0.0187, 0.0293, 0.0123, 0.0157),
    ("mf", "amazon_toys"): (0.0079, 0.0267, 0.0427, 0.0174, 0.0225),
    ("mf", "movielens_1m"): (0.0117, 0.0470, 0.0836, 0.0291, 0.0408),
    ("stosa", "amazon_beauty"): (0.0166, 0.0479, 0.0680, 0.0327, 0.0391),
    ("stosa", "amazon_tools"): (0.0095, 0.0276, 0.0417, 0.0186, 0.0231),
    ("stosa", "amazon_toys"): (0.0232, 0.0571, 0.0776, 0.0406, 0.0472),
    ("stosa", "movielens_1m"): (0.0457, 0.1409, 0.2185, 0.0932, 0.1181),
}

# The official code's five runs of SEvo-AdamW at some epochs: mean training loss, and the
# lowest and highest validation NDCG@10 (no validation after the first epoch).
Curve: TypeAlias = dict[int, tuple[float, float | None, float | None]]
CURVES: dict[tuple[str, str], Curve] = {
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
    ("bert4rec", "amazon_beauty"): {
        1: (9.3475, None, None),
        5: (8.6385, 0.0101, 0.0115),
        10: (8.3447, 0.0161, 0.0171),
        20: (8.0589, 0.0221, 0.0236),
        40: (7.7400, 0.0341, 0.0357),
        100: (7.2502, 0.0477, 0.0500),
        200: (6.8348, 0.0563, 0.0586),
        300: (6.6390, 0.0577, 0.0596),
        500: (6.4842, 0.0577, 0.0604),
    },
    ("bert4rec", "amazon_tools"): {
        1: (9.1689, None, None),
        5: (8.9917, 0.0023, 0.0035),
        10: (8.6633, 0.0087, 0.0108),
        20: (8.3591, 0.0160, 0.0171),
        40: (8.0445, 0.0223, 0.0232),
        100: (7.5536, 0.0286, 0.0297),
        200: (7.2445, 0.0294, 0.0324),
        300: (7.1264, 0.0307, 0.0314),
        500: (7.0286, 0.0301, 0.0318),
    },
    ("bert4rec", "amazon_toys"): {
        1: (9.3018, None, None),
        5: (8.6680, 0.0058, 0.0077),
        10: (8.3527, 0.0132, 0.0146),
        20: (7.8963, 0.0248, 0.0262),
        40: (7.4089, 0.0369, 0.0387),
        100: (6.5978, 0.0535, 0.0551),
        200: (6.1116, 0.0545, 0.0564),
        300: (5.9464, 0.0541, 0.0555),
        500: (5.8137, 0.0536, 0.0554),
    },
    ("mf", "amazon_beauty"): {
        1: (0.6927, None, None),
        5: (0.5232, 0.0258, 0.0280),
        10: (0.2835, 0.0309, 0.0318),
        20: (0.1155, 0.0332, 0.0346),
        40: (0.0503, 0.0349, 0.0363),
        100: (0.0202, 0.0370, 0.0381),
        200: (0.0114, 0.0385, 0.0398),
        300: (0.0089, 0.0392, 0.0407),
        500: (0.0069, 0.0404, 0.0415),
        1000: (0.0056, 0.0414, 0.0423),
    },
    ("mf", "amazon_tools"): {
        1: (0.6929, None, None),
        5: (0.6298, 0.0146, 0.0159),
        10: (0.4211, 0.0186, 0.0198),
        20: (0.2044, 0.0216, 0.0225),
        40: (0.1215, 0.0233, 0.0242),
        100: (0.0832, 0.0259, 0.0262),
        200: (0.0668, 0.0271, 0.0279),
        300: (0.0606, 0.0277, 0.0287),
        500: (0.0558, 0.0284, 0.0300),
        1000: (0.0518, 0.0293, 0.0303),
    },
    ("mf", "amazon_toys"): {
        1: (0.6929, None, None),
        5: (0.5844, 0.0260, 0.0274),
        10: (0.3180, 0.0291, 0.0307),
        20: (0.1315, 0.0331, 0.0344),
        40: (0.0572, 0.0368, 0.0375),
        100: (0.0226, 0.0401, 0.0411),
        200: (0.0127, 0.0424, 0.0431),
        300: (0.0097, 0.0434, 0.0445),
        500: (0.0072, 0.0447, 0.0455),
        1000: (0.0057, 0.0459, 0.0466),
    },
    ("stosa", "amazon_beauty"): {
        1: (0.8408, None, None),
        5: (0.4563, 0.0257, 0.0293),
        10: (0.3302, 0.0364, 0.0378),
        20: (0.2407, 0.0416, 0.0423),
        40: (0.1758, 0.0458, 0.0463),
        100: (0.1150, 0.0505, 0.0512),
        200: (0.0759, 0.0554, 0.0563),
        300: (0.0520, 0.0572, 0.0584),
        500: (0.0299, 0.0570, 0.0583),
    },
    ("stosa", "amazon_tools"): {
        1: (0.9094, None, None),
        5: (0.5934, 0.0117, 0.0163),
        10: (0.4521, 0.0206, 0.0220),
        20: (0.3264, 0.0242, 0.0252),
        40: (0.2396, 0.0283, 0.0299),
        100: (0.1600, 0.0315, 0.0324),
        200: (0.1105, 0.0324, 0.0337),
        300: (0.0808, 0.0329, 0.0337),
        500: (0.0438, 0.0313, 0.0327),
    },
    ("stosa", "amazon_toys"): {
        1: (0.8721, None, None),
        5: (0.4853, 0.0291, 0.0323),
        10: (0.3389, 0.0399, 0.0431),
        20: (0.2464, 0.0486, 0.0501),
        40: (0.1822, 0.0533, 0.0553),
        100: (0.1195, 0.0581, 0.0593),
        200: (0.0776, 0.0611, 0.0630),
        300: (0.0532, 0.0631, 0.0643),
        500: (0.0289, 0.0631, 0.0650),
    },
}

# The same of MF-BPR over users and items together.
_CURVES_USERS_ITEMS: dict[tuple[str, str], Curve] = {
    ("mf", "amazon_beauty"): {
        1: (0.6916, None, None),
        5: (0.2474, 0.0262, 0.0275),
        10: (0.0707, 0.0287, 0.0296),
        20: (0.0323, 0.0309, 0.0314),
        40: (0.0193, 0.0326, 0.0334),
        100: (0.0121, 0.0339, 0.0359),
        200: (0.0083, 0.0354, 0.0369),
        300: (0.0066, 0.0371, 0.0379),
        500: (0.0049, 0.0378, 0.0386),
        1000: (0.0036, 0.0380, 0.0389),
    },
    ("mf", "amazon_toys"): {
        1: (0.6922, None, None),
        5: (0.3031, 0.0270, 0.0286),
        10: (0.0571, 0.0295, 0.0308),
        20: (0.0241, 0.0313, 0.0325),
        40: (0.0142, 0.0336, 0.0342),
        100: (0.0088, 0.0360, 0.0368),
        200: (0.0062, 0.0384, 0.0388),
        300: (0.0050, 0.0392, 0.0402),
        500: (0.0034, 0.0398, 0.0410),
        1000: (0.0022, 0.0415, 0.0423),
    },
    ("mf", "amazon_tools"): {
        1: (0.6927, None, None),
        5: (0.4623, 0.0183, 0.0206),
        10: (0.1195, 0.0213, 0.0224),
        20: (0.0553, 0.0221, 0.0235),
        40: (0.0442, 0.0228, 0.0244),
        100: (0.0374, 0.0254, 0.0259),
        200: (0.0325, 0.0267, 0.0278),
        300: (0.0293, 0.0274, 0.0286),
        500: (0.0256, 0.0279, 0.0296),
        1000: (0.0216, 0.0282, 0.0293),
    },
    ("mf", "movielens_1m"): {
        1: (0.4333, None, None),
        5: (0.2674, 0.0240, 0.0247),
        10: (0.2051, 0.0281, 0.0291),
        20: (0.1544, 0.0343, 0.0350),
        40: (0.1189, 0.0369, 0.0388),
        100: (0.0885, 0.0425, 0.0435),
        200: (0.0781, 0.0422, 0.0458),
        300: (0.0760, 0.0440, 0.0451),
        500: (0.0750, 0.0428, 0.0446),
        1000: (0.0743, 0.0437, 0.0453),
    },
}


SEEDS = 5  # of the published runs, and what a measured row should have
# Items, and interactions to train on, of the data that the published numbers are of.
SIZES = {
    "amazon_beauty": (12_101, 153_776),
    "amazon_toys": (11_924, 128_773),
    "amazon_tools": (10_217, 101_200),
    "movielens_1m": (3_416, 987_531),
}


def published_data(data: Mapping[str, Any]) -> str | None:
    """The dataset of published runs that `data` is, by its name and its sizes, or None."""
    name = known_name(data["name"])
    sizes = data.get("items"), data.get("train")
    return name if sizes == SIZES.get(name) else None


def has_other_sizes(data: Mapping[str, Any]) -> bool:
    """Whether `data` is called as that of published runs, but is not the same."""
    return known_name(data["name"]) in SIZES and published_data(data) is None


def published(
    config: Config, data: Mapping[str, Any]
) -> dict[str, tuple[float, float | None]] | None:
    """Mean and spread of the published metrics of a run, or None where there are none.

    There are some only for the settings of the presets, trained with SEvo-AdamW or Adam, and
    for MF-BPR over users and items.

    Args:
      config: of the run.
      data: what its records say of the data: `name`, `items` and `train` must be those of the
        published runs, so that no other split or filter is taken for theirs.
    """
    if (name := published_data(data)) is None:
        return None
    key = (config.model, name)
    usual, known = preset(*key, config.optimizer), _SEVO.get(key)
    # What may differ from theirs: the packing, the order, and when to validate.
    free = {"streams": 1, "loader_workers": 1, "eval_every": usual.eval_every}
    config = replace(config, **free)
    if config.graph == "users_items" and config.optimizer == "sevo_adamw":
        beta, *known = _USERS_ITEMS[key]
        usual = preset(*key, config.optimizer, graph=config.graph, beta=beta)
    if config.changes(usual):
        return None
    if config.optimizer == "sevo_adamw" and known:
        return dict(zip(_NAMES, zip(*known, strict=True), strict=True))
    if config.optimizer == "adam" and key in _ADAM:
        return {name: (mean, None) for name, mean in zip(_NAMES, _ADAM[key], strict=True)}
    return None


def official_curve(config: Config, data: Mapping[str, Any]) -> Curve:
    """What the official logs have along a run that `published` has SEvo-AdamW's metrics of."""
    if config.optimizer != "sevo_adamw" or not published(config, data):
        return {}
    curves = _CURVES_USERS_ITEMS if config.graph == "users_items" else CURVES
    return curves.get((config.model, known_name(data["name"])), {})


# Table 5, by arm of the ablation `distillation`: SASRec on Beauty, means of five runs.
_DISTILLED = {
    "student": (0.0094, 0.0327, 0.0526, 0.0210, 0.0275),
    "teacher": (0.0198, 0.0544, 0.0786, 0.0374, 0.0452),
    "KD": (0.0105, 0.0352, 0.0552, 0.0229, 0.0294),
    "RKD": (0.0082, 0.0311, 0.0515, 0.0196, 0.0262),
    "HTD": (0.0085, 0.0344, 0.0549, 0.0215, 0.0281),
    "DKD": (0.0138, 0.0389, 0.0577, 0.0265, 0.0325),
    "SEvo": (0.0107, 0.0364, 0.0576, 0.0236, 0.0304),
    "SEvo + DKD": (0.0166, 0.0407, 0.0568, 0.0289, 0.0341),
}


def published_arm(
    ablation: str, model: str, data: Mapping[str, Any], arm: str, given: Mapping[str, Any]
) -> dict[str, float] | None:
    """The published means of an ablation's arm, or None where there are none.

    Args:
      ablation, model, arm: names.
      data: see `published`.
      given: settings that were not the preset's; with any, nothing published compares.
    """
    place = ablation, model, published_data(data)
    if given or place != ("distillation", "sasrec", "amazon_beauty"):
        return None
    return dict(zip(_NAMES, _DISTILLED[arm], strict=True))


# The last lines of Table 2: average seconds of training, and what SEvo adds to them.
TRAINING_SECONDS = {
    "mf": (2863, 173),
    "gru4rec": (3582, 124),
    "sasrec": (532, 37),
    "bert4rec": (1256, 288),
    "stosa": (2087, 127),
}
