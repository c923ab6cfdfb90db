"""Balancing strategies, one small file each. None imports another; `Chain` and `Schedule` compose any of them."""

from himoe.balance.base import Balancer, step_balancers
from himoe.balance.chain import Chain
from himoe.balance.dual_ascent import DualAscent
from himoe.balance.expert_threshold import ExpertThreshold
from himoe.balance.global_batch import GlobalBatch
from himoe.balance.importance import Importance
from himoe.balance.load import Load
from himoe.balance.local_entropy import LocalEntropy
from himoe.balance.logit_correction import LogitCorrection
from himoe.balance.loss_free import LossFree
from himoe.balance.momentum import Momentum
from himoe.balance.per_group import PerGroup
from himoe.balance.phi import Phi
from himoe.balance.quantile import Quantile
from himoe.balance.relu_sparsity import ReluSparsity
from himoe.balance.schedule import Schedule
from himoe.balance.sequence import SequenceBalance
from himoe.balance.similarity import Similarity
from himoe.balance.switch import Switch
from himoe.balance.two_level import TwoLevelTerms
from himoe.balance.z_loss import ZLoss

__all__ = [
    "Balancer",
    "Chain",
    "DualAscent",
    "ExpertThreshold",
    "GlobalBatch",
    "Importance",
    "Load",
    "LocalEntropy",
    "LogitCorrection",
    "LossFree",
    "Momentum",
    "PerGroup",
    "Phi",
    "Quantile",
    "ReluSparsity",
    "Schedule",
    "SequenceBalance",
    "Similarity",
    "Switch",
    "TwoLevelTerms",
    "ZLoss",
    "step_balancers",
]
