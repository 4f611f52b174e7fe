"""Symmetric matrices known through their products with vectors."""

from batchlr.operators.base import LinearOperator as LinearOperator
from batchlr.operators.dense import DenseOperator as DenseOperator
from batchlr.operators.difference import DifferenceOperator as DifferenceOperator
from batchlr.operators.ggn import GGNOperator as GGNOperator
from batchlr.operators.hessian import HessianOperator as HessianOperator
from batchlr.operators.preconditioned import PreconditionedOperator as PreconditionedOperator
from batchlr.operators.restricted import RestrictedOperator as RestrictedOperator
from batchlr.operators.restricted import layer_blocks as layer_blocks
from batchlr.operators.supervised import supervised as supervised
from batchlr.operators.unsharded import unsharded as unsharded
