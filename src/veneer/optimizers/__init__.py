"""PEFT's optimizers, under its names: LoRA+, LoRA-FA and Riemannian preconditioning."""

from .lorafa import LoraFAOptimizer as LoraFAOptimizer
from .lorafa import create_lorafa_optimizer as create_lorafa_optimizer
from .loraplus import create_loraplus_optimizer as create_loraplus_optimizer
from .riemannian import create_riemannian_optimizer as create_riemannian_optimizer
