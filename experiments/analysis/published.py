"""Mean rank correlations published by the authors of the study, to compare a run with."""

from __future__ import annotations

SOURCE = (
    "Hayne, Jung & Carter, Does Representation Similarity Capture Function Similarity?, TMLR 2024: "
    "Spearman correlations from the authors' published results, averaged over class x layer "
    "(with the sign of CCA similarities changed)"
)

#: For each network (by its preset's name) and metric: the correlations with the loss of network
#: performance (rank of the true class) and of linear decodability (the paper's probe).
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "alexnet": {
        "cka": (0.158, 0.474),
        "procrustes": (0.174, 0.451),
        "pwcca": (0.169, 0.350),
        "cca": (0.163, 0.341),
        "cca_squared": (0.163, 0.343),
    },
    "mobilenet_v2_035": {
        "cka": (0.169, 0.633),
        "procrustes": (0.154, 0.609),
        "pwcca": (0.097, 0.509),
        "cca": (0.090, 0.498),
        "cca_squared": (0.090, 0.498),
    },
    "resnet50": {
        "cka": (0.404, 0.769),
        "procrustes": (0.414, 0.807),
        "pwcca": (0.331, 0.407),
        "cca": (0.332, 0.416),
        "cca_squared": (0.332, 0.415),
    },
}
