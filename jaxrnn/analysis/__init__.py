"""Analysis of a recurrent network: numbers first, and a figure for each.

| topic | numbers | figure |
|---|---|---|
| vanishing and exploding gradients | `gradient_flow` | `plot_gradient_flow` |
| how much a step stretches the carry | `singular_values` | `plot_singular_values` |
| how much it does so in the long run | `lyapunov_exponents` | `plot_lyapunov_exponents` |
| gates that are shut or open | `gate_saturation` | `plot_gate_saturation` |
| how far back the network remembers | `memory_length` | `plot_memory_length` |
| memory of a training step in bytes | `training_memory` | `plot_training_memory` |
| the course of training | the `History` of `fit` | `plot_history` |

All figures are drawn in `STYLE`; `matplotlib.style.use(jaxrnn.analysis.STYLE)` draws your own like them.
"""

from jaxrnn.analysis.footprint import TrainingMemory, training_memory
from jaxrnn.analysis.gates import Saturation, gate_saturation
from jaxrnn.analysis.gradient import GradientFlow, gradient_flow
from jaxrnn.analysis.jacobian import JacobianSpectrum, LyapunovSpectrum, lyapunov_exponents, singular_values
from jaxrnn.analysis.memory import MemoryLength, memory_length
from jaxrnn.analysis.plots import (
    STYLE,
    plot_gate_saturation,
    plot_gradient_flow,
    plot_history,
    plot_lyapunov_exponents,
    plot_memory_length,
    plot_singular_values,
    plot_training_memory,
)

__all__ = [
    "STYLE",
    "GradientFlow",
    "JacobianSpectrum",
    "LyapunovSpectrum",
    "MemoryLength",
    "Saturation",
    "TrainingMemory",
    "gate_saturation",
    "gradient_flow",
    "lyapunov_exponents",
    "memory_length",
    "plot_gate_saturation",
    "plot_gradient_flow",
    "plot_history",
    "plot_lyapunov_exponents",
    "plot_memory_length",
    "plot_singular_values",
    "plot_training_memory",
    "singular_values",
    "training_memory",
]
