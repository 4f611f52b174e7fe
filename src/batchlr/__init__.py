"""Learning rates and momentum measured from the batch Hessian, at any batch size."""

# ruff: noqa: I001  # grouped by use, not by name

# Which rate, momentum and weight decay at which batch size
from batchlr.batch_size_change import SettingChange as SettingChange
from batchlr.batch_size_change import batch_size_change as batch_size_change
from batchlr.batch_size_change import scaling_reach as scaling_reach
from batchlr.scaling_rules import batch_growth_for_decay as batch_growth_for_decay
from batchlr.scaling_rules import rescale_lr as rescale_lr
from batchlr.surge import SurgeLaw as SurgeLaw
from batchlr.surge import fit_surge_law as fit_surge_law
from batchlr.lr_bound import LRBound as LRBound

# What curvature says about any batch size
from batchlr.curvature import measure_curvature as measure_curvature
from batchlr.curvature import track_curvature as track_curvature
from batchlr.curvature_report import CurvatureReport as CurvatureReport
from batchlr.edge_laws import EdgeLaw as EdgeLaw
from batchlr.edge_laws import edge_laws as edge_laws

# While training: a torch scheduler with a movable peak, and what moves it
from batchlr.schedulers import BatchAwareLR as BatchAwareLR
from batchlr.controller import CurvatureController as CurvatureController
from batchlr.on_the_fly.curvature_update import CurvatureUpdate as CurvatureUpdate

# Batch sizes from the gradient's noise, and optimizers that mind the batch
from batchlr.adascale import AdaScale as AdaScale
from batchlr.optim.adagrad_norm import AdaGradNorm as AdaGradNorm
from batchlr.optim.batch_invariant_adam import BatchInvariantAdam as BatchInvariantAdam
from batchlr.batch_size import AdaptiveBatchSize as AdaptiveBatchSize
from batchlr.batch_size import BatchSizeTest as BatchSizeTest
from batchlr.gradients.gradient_scatter import GradientScatter as GradientScatter
from batchlr.gradients.gradient_scatter import scatter_of_gradients as scatter_of_gradients
from batchlr.gradients.group_gradients import GroupGradients as GroupGradients
from batchlr.gradients.sample_gradients import sample_gradients as sample_gradients

# Curvature matrices, known through their products
from batchlr.operators import DenseOperator as DenseOperator
from batchlr.operators import GGNOperator as GGNOperator
from batchlr.operators import HessianOperator as HessianOperator
from batchlr.operators import LinearOperator as LinearOperator
from batchlr.operators import PreconditionedOperator as PreconditionedOperator
from batchlr.operators import RestrictedOperator as RestrictedOperator
from batchlr.operators import layer_blocks as layer_blocks
from batchlr.operators import supervised as supervised
from batchlr.operators import unsharded as unsharded

# Spectra
from batchlr.lanczos import Eigenpairs as Eigenpairs
from batchlr.lanczos import Tridiagonal as Tridiagonal
from batchlr.lanczos import lanczos as lanczos
from batchlr.lanczos import top_eigenpairs as top_eigenpairs
from batchlr.slq import SpectralMeasure as SpectralMeasure
from batchlr.slq import stochastic_lanczos_quadrature as stochastic_lanczos_quadrature
from batchlr.layer_spectra import layer_eigenpairs as layer_eigenpairs
from batchlr.layer_spectra import layer_measures as layer_measures
from batchlr.tracker import CurvatureTracker as CurvatureTracker
from batchlr.tracker import TrackedCurvature as TrackedCurvature

# Formulas on plain floats
from batchlr.random_matrix import SpikedMarchenkoPastur as SpikedMarchenkoPastur
from batchlr.random_matrix import SpikedWigner as SpikedWigner
from batchlr.learning_rates import StepSize as StepSize
from batchlr.learning_rates import heavy_ball as heavy_ball
from batchlr.learning_rates import max_adam_lr as max_adam_lr
from batchlr.learning_rates import max_sgd_lr as max_sgd_lr
from batchlr.learning_rates import min_damping as min_damping
from batchlr.averaging import ExponentialAverage as ExponentialAverage
from batchlr.averaging import UniformAverage as UniformAverage
from batchlr.averaging import effective_lr as effective_lr
from batchlr.escape import CurvatureShapedEscape as CurvatureShapedEscape
from batchlr.escape import IsotropicEscape as IsotropicEscape
from batchlr.escape import LogBarrierEscape as LogBarrierEscape
from batchlr.escape import SgdNoise as SgdNoise
from batchlr.escape import log_escape_ratio as log_escape_ratio

# Numbers to watch in a run
from batchlr.probes import BatchSharpness as BatchSharpness
from batchlr.probes import batch_sharpness as batch_sharpness
from batchlr.loss_probe import LossParabola as LossParabola
from batchlr.loss_probe import LossProbe as LossProbe
from batchlr.loss_probe import ProbedLosses as ProbedLosses
from batchlr.loss_probe import mean_vertex as mean_vertex
from batchlr.stationarity import fluctuation_dissipation as fluctuation_dissipation
