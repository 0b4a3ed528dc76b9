"""Which parameters are trained (`training.train`): the others get no gradient, no optimiser state and no part in the gradient norm.

Fine-tuning with the MoE layers frozen does as well as with all of them trained; training them alone does not (Zoph 2022, section 6.2).
"""

from __future__ import annotations

from torch import nn

from moe.layer import MoeLayer
from moe.model import Transformer
from moe.train.stop import SpecRefused


def freeze(model: Transformer, train: str) -> list[nn.Parameter]:
    """Freezes what `train` leaves out, and returns what is trained, in the model's order. Raises SpecRefused where that is nothing."""
    if train != "all":
        moe = {id(parameter) for layer in model.modules() if isinstance(layer, MoeLayer) for parameter in layer.parameters()}
        routers = {id(parameter) for parameter in model.router_parameters()}
        for parameter in model.parameters():
            chosen = {"all_but_moe": id(parameter) not in moe, "only_moe": id(parameter) in moe, "only_router": id(parameter) in routers}
            parameter.requires_grad_(chosen[train])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise SpecRefused("training.train", f"{train} leaves nothing to train in this model")
    return trained
