"""What is too large to run: told with field, figure and limit, before anything is allocated."""

from __future__ import annotations

from spec.accounting.count import n_moe_layers, n_mtp_moe_layers
from spec.accounting.figures import price
from spec.accounting.text import bytes_text, count_text
from spec.experiment import ExperimentSpec
from spec.problems import Problem

MAX_LAYERS = 1_000
# Counts and probabilities of one step must fit one 4 MB frame of the ingest socket, with room to spare.
MAX_ROUTING_CELLS = 131_072

_FIELD_OF_PART = {
    "embedding": "/model/vocab_size",
    "head": "/model/vocab_size",
    "dense_ffn": "/model/d_ff",
    "routers": "/model/moe/n_experts",
    "experts": "/model/moe/n_experts",
    "shared_experts": "/model/moe/n_shared",
    "mtp": "/model/mtp_depth",
}


def check_size(spec: ExperimentSpec, *, max_params: float, max_layers: int = MAX_LAYERS, max_bytes_per_device: int | None = None) -> list[Problem]:
    """Why `spec` is too large to run here: field, figure and limit of each excess; empty when it fits."""
    problems, model = [], spec.model
    layers = model.n_layers + model.encoder_layers + model.mtp_depth
    if layers > max_layers:
        problems.append(Problem("/model/n_layers", f"n_layers: {layers:,} layers > limit {max_layers:,}"))
    cost = price(spec)
    held_params = cost.total_params + cost.mtp_params
    if held_params > max_params:
        largest = _FIELD_OF_PART.get(max(cost.by_part, key=cost.by_part.__getitem__), "/model/d_model")
        held = bytes_text(16 * held_params)
        detail = f"{count_text(held_params)} parameters ({held} with gradients and optimiser) > limit {count_text(max_params)}"
        problems.append(Problem(largest, f"{largest.rsplit('/', 1)[1]}: {detail}"))
    sparse, experts = n_moe_layers(model) + n_mtp_moe_layers(model), model.moe.n_experts if model.moe else 0
    if sparse * experts > MAX_ROUTING_CELLS:
        detail = f"{sparse:,} MoE layers x {experts:,} experts = {sparse * experts:,} token counts a step > limit {MAX_ROUTING_CELLS:,}"
        problems.append(Problem("/model/moe/n_experts", f"n_experts: {detail}"))
    routed = model.attention.experts.n_experts if model.attention.kind == "gqa" and model.attention.experts else 0
    if layers * routed > MAX_ROUTING_CELLS:
        detail = f"{layers:,} layers x {routed:,} attention experts = {layers * routed:,} token counts a step > limit {MAX_ROUTING_CELLS:,}"
        problems.append(Problem("/model/attention/experts/n_experts", f"n_experts: {detail}"))
    if max_bytes_per_device is not None and cost.bytes.total_per_device > max_bytes_per_device:
        detail = f"{bytes_text(cost.bytes.total_per_device)} on one device, {bytes_text(cost.bytes.activations)} of it activations"
        problems.append(Problem("/training/batch_size", f"batch_size: {detail} > limit {bytes_text(max_bytes_per_device)}"))
    return problems
