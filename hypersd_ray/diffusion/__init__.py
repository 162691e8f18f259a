"""Noise schedules, parameterisations, the solver and the segment sampler. Knows torch and nothing else.

Time is the paper's integer t in 0..T: 0 is clean data, T the noisiest point (docs/design.md).
"""

from hypersd_ray.diffusion.parameterization import Parameterization, Prediction
from hypersd_ray.diffusion.schedule import Schedule
from hypersd_ray.diffusion.segments import Times
from hypersd_ray.diffusion.solver import Denoiser

__all__ = ["Denoiser", "Parameterization", "Prediction", "Schedule", "Times"]
