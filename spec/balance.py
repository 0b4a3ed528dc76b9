"""Balancing terms, as a person describes them: what keeps a router from sending everything to a few experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spec.part import Part, field


class SwitchAux(Part):
    """a * E * sum_i f_i P_i over the micro-batch (Fedus 2022, eq. 4-6; for k > 1 DeepSeek's expert-level loss, f_i = n_i / (k T))."""

    kind: Literal["switch_aux"] = "switch_aux"
    coefficient: float = field(0.01, "Weight of the term in the loss.", ge=0, le=100)
    choices: Literal["all", "first"] = field("all", "Which choices f counts: all k (DeepSeek, expert level) or each token's first (GShard).")


class DeviceAux(Part):
    """a * sum_D f'_D P'_D: f' the mean of f_i over a device's experts, P' the sum of their P_i (DeepSeek-V2, eq. 26-28)."""

    kind: Literal["device_aux"] = "device_aux"
    coefficient: float = field(0.05, "Weight of the term in the loss.", ge=0, le=100)
    n_devices: int = field(4, "Devices that share the experts, in equal consecutive parts; divides n_experts.", ge=1, le=4096, unit="devices")


class CommunicationAux(Part):
    """a * sum_D f''_D P''_D: f'' = D / (M T) times the tokens sent to the device (DeepSeek-V2, eq. 29-31)."""

    kind: Literal["communication_aux"] = "communication_aux"
    coefficient: float = field(0.02, "Weight of the term in the loss.", ge=0, le=100)
    n_devices: int = field(4, "Devices that share the experts, in equal consecutive parts; divides n_experts.", ge=1, le=4096, unit="devices")


class SequenceAux(Part):
    """The product of switch_aux within each sequence, on scores normalised to sum to one and without selection bias (DeepSeek-V3, eq. 17-20)."""

    kind: Literal["sequence_aux"] = "sequence_aux"
    coefficient: float = field(1e-4, "Weight of the term in the loss.", ge=0, le=100)


class GlobalAux(Part):
    """switch_aux with f over all ranks and micro-batches of the step so far (Qiu 2025)."""

    kind: Literal["global_aux"] = "global_aux"
    coefficient: float = field(0.01, "Weight of the term in the loss.", ge=0, le=100)


class ImportanceCv2(Part):
    """Squared coefficient of variation of the experts' summed gates (Shazeer 2017, eq. 6-7)."""

    kind: Literal["importance_cv2"] = "importance_cv2"
    coefficient: float = field(0.1, "Weight of the term in the loss.", ge=0, le=100)


class LoadCv2(Part):
    """Squared coefficient of variation of the experts' smooth load, which the noise of noisy_topk makes differentiable (Shazeer 2017, eq. 8-11)."""

    kind: Literal["load_cv2"] = "load_cv2"
    coefficient: float = field(0.1, "Weight of the term in the loss.", ge=0, le=100)


class ZLoss(Part):
    """b * mean(logsumexp(logits)^2) (Zoph 2022, eq. 5)."""

    kind: Literal["z_loss"] = "z_loss"
    coefficient: float = field(1e-3, "Weight of the term in the loss.", ge=0, le=100)


class LossFreeBias(Part):
    """Experts are selected by score + b and weighed by score; b_i += u * sign(mean(c) - c_i) (Wang 2024)."""

    kind: Literal["loss_free_bias"] = "loss_free_bias"
    update_rate: float = field(
        1e-3,
        "u: the change of an expert's bias in one optimiser step. It must keep up with the router: 0.001 goes with long runs at rates near 2e-4 "
        "(DeepSeek-V3), and is far too slow for some hundred steps at 3e-3.",
        gt=0,
        le=1,
    )


BalanceLoss = SwitchAux | DeviceAux | CommunicationAux | SequenceAux | GlobalAux | ImportanceCv2 | LoadCv2 | ZLoss
BalanceTerm = Annotated[BalanceLoss | LossFreeBias, Field(discriminator="kind")]
