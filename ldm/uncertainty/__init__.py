"""What members or a posterior disagree on: mutual information, distances, variances along the sampler.

The propagation of variances along a sampler has a door of its own, `ldm.uncertainty.propagation`.
"""

from ldm.modules.distributions.gaussian import Gaussian
from ldm.uncertainty.agreement import Agreement
from ldm.uncertainty.aleatoric import DataPosterior, data_covariance, data_posterior
from ldm.uncertainty.branch import Branched, branch_index, branch_indices
from ldm.uncertainty.information import (
    DISTANCES,
    VarianceParts,
    bhattacharyya,
    kl,
    mean_pairwise_distance,
    mutual_information,
    paide,
    saturation,
    total_variance,
    wasserstein2_squared,
)
from ldm.uncertainty.monte_carlo import MonteCarlo, monte_carlo_information
from ldm.uncertainty.quantities import (
    Estimator,
    GroupQuantities,
    Quantities,
    compare_groups,
    compute_quantities,
    pixel_maps,
    step_curve,
)
from ldm.uncertainty.results import ClassInformation, Information, PixelInformation

__all__ = [
    "DISTANCES",
    "Agreement",
    "Branched",
    "ClassInformation",
    "DataPosterior",
    "Estimator",
    "Gaussian",
    "GroupQuantities",
    "Information",
    "MonteCarlo",
    "PixelInformation",
    "Quantities",
    "VarianceParts",
    "bhattacharyya",
    "branch_index",
    "branch_indices",
    "compare_groups",
    "compute_quantities",
    "data_covariance",
    "data_posterior",
    "kl",
    "mean_pairwise_distance",
    "monte_carlo_information",
    "mutual_information",
    "paide",
    "pixel_maps",
    "saturation",
    "step_curve",
    "total_variance",
    "wasserstein2_squared",
]
