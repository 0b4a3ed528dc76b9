"""What a spec costs, before anything is allocated: closed form, exact Python ints, microseconds.

Parameters   every number that is trained. Buffers (DeepSeek-V3's selection bias) are not counted.
             Blocks of multi-token prediction are counted apart (`mtp_params`), as publications do: a model is run without them.
Active       what one token uses, in the three conventions that publications mix: A0 all of it, A1 without the input
             embedding, A2 without input and output embedding. A tied matrix is taken off once.
FLOPs        forward: 2 for each weight of a matrix that a token is multiplied by (the output projection counts, the
             embedding lookup, norms, biases and softmax do not), and for the attention scores and values
             2 * heads * (d_qk + d_v) * mean context at the spec's seq_len, causal: (S + 1) / 2, within a window or chunk less;
             4 * heads * head_dim^2 for lightning attention, in its recurrent form. Every token counts top_k experts, also where
             a router may choose fewer (gshard, capacity) or each expert chooses (expert_choice: top_k on average).
             training: 3 * forward, with the blocks of multi-token prediction and their heads. Recomputed activations,
             dropped tokens and what training.train freezes change neither: this is model FLOPs, which a run's TFLOP/s and
             utilisation (`mfu`) are reckoned with.
             Encoder-decoder: per pair of one source and one target token, both sequences of seq_len tokens.
Bytes        on one device: weights and gradients float32, AdamW's two moments float32; experts are divided over
             parallel.expert ranks, the rest is replicated, or with parallel.shard divided over all ranks by whole rows, padding and all
             (in bfloat16 matrices but routers' alone; gradients not before the last of several micro-batches), as on the fullest rank;
             what training.train leaves out has neither gradient nor moments.
             `copies`: of weights, in bfloat16 for its products, and with parallel.shard what is whole meanwhile, see `copies.copy_bytes`.
             `activations` is an estimate, see `memory.activation_bytes`. `reduction`: the largest buffer in which gradients are joined to
             be reduced over ranks, when the backward pass has let go of copies and activations: the total has the larger of the two.
             `checkpoint` is the whole file set: weights and moments.
All-to-all   each of the top_k copies of a token crosses with probability (ranks - 1) / ranks, out and back, in the
             forward and in the backward pass (and once more where activations are recomputed), at the width of the residual
             stream in the arithmetic's precision.
Sharding     what parallel.shard sends from a device in a step, see `copies.sharding_bytes`.
"""

from spec.accounting.count import PARTS
from spec.accounting.figures import ActiveParams, Bytes, Flops, Price, price
from spec.accounting.limits import check_size
from spec.accounting.text import bytes_text, count_text, table

__all__ = ["PARTS", "ActiveParams", "Bytes", "Flops", "Price", "bytes_text", "check_size", "count_text", "price", "table"]
