"""The figures as text for a terminal."""

from __future__ import annotations

from spec.accounting.figures import Price


def table(cost: Price) -> str:
    """`cost` as lines of label and figure; parts as lines of total and active parameters."""
    active, flops, size = cost.active_params, cost.flops_per_token, cost.bytes
    rows = [
        ("parameters", f"{cost.total_params:,}"),
        ("active", f"{active.with_embeddings:,}"),
        ("  without input embedding", f"{active.without_input_embedding:,}"),
        ("  without embeddings", f"{active.without_embeddings:,}"),
        *([("multi-token prediction", f"{cost.mtp_params:,}")] if cost.mtp_params else []),
        ("FLOPs per token, forward", f"{flops.forward:,}"),
        ("FLOPs per token, training", f"{flops.training:,}"),
        ("tokens per step", f"{cost.tokens_per_step:,}"),
        ("weights", bytes_text(size.weights)),
        ("gradients", bytes_text(size.gradients)),
        ("optimiser", bytes_text(size.optimizer)),
        ("copies of weights (estimate)", bytes_text(size.copies)),
        ("activations (estimate)", bytes_text(size.activations)),
        *([("joined for reduction", bytes_text(size.reduction))] if size.reduction else []),
        ("together, on one device", bytes_text(size.total_per_device)),
        ("checkpoint", bytes_text(size.checkpoint)),
        ("all-to-all per token", bytes_text(cost.all_to_all_bytes_per_token)),
        *([("sharding per step", bytes_text(cost.sharding_bytes_per_step))] if cost.sharding_bytes_per_step else []),
        ("KV cache per token", bytes_text(cost.kv_cache_bytes_per_token)),
        ("KV cache of a sequence", bytes_text(cost.kv_cache_bytes_per_sequence)),
    ]
    lines = [f"{label:<28}{figure:>24}" for label, figure in rows]
    lines += ["", f"{'part':<28}{'total':>24}{'active':>24}"]
    lines += [f"{name.replace('_', ' '):<28}{total:>24,}{cost.active_by_part[name]:>24,}" for name, total in cost.by_part.items() if total]
    return "\n".join(lines)


def count_text(n: float) -> str:
    """`n` in scientific notation without padding: 1.0e12."""
    mantissa, exponent = f"{n:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def bytes_text(size: int) -> str:
    """`size` in bytes with a decimal unit: 16 TB."""
    figure = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if figure < 999.5:
            return f"{figure:.3g} {unit}"
        figure /= 1000
    return f"{figure:.3g} EB"
