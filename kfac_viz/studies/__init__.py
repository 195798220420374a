"""One module for each question, named like its notebook: ``run``, its ``Result``, its ``Plot`` and its exercises."""

from types import ModuleType

from ..parameters import take as take  # for notebooks
from . import (
    coarse_space,
    coarse_space_sizes,
    damping,
    depth,
    fisher,
    kfac,
    kronecker_products,
    layer_overlap,
    one_step,
    pde,
    published,
    solving,
    speed,
    training,
    two_levels,
    which_method,
)
from . import hessian as hessian  # the second study of 01

# The notebooks that can be regenerated, each with its study: the signature of ``run`` states the parameters.
NOTEBOOKS: dict[str, ModuleType] = {
    "00_playground": coarse_space,
    "01_fisher": fisher,
    "02_kfac": kfac,
    "03_kronecker_products": kronecker_products,
    "04_damping": damping,
    "05_two_levels": two_levels,
    "06_one_step": one_step,
    "07_coarse_space": coarse_space,
    "08_coarse_space_sizes": coarse_space_sizes,
    "09_layer_overlap": layer_overlap,
    "10_depth": depth,
    "11_solving": solving,
    "12_training": training,
    "13_published": published,
    "14_speed": speed,
    "15_pde": pde,
    "16_which_method": which_method,
}
