/** A `steps` block, read once: typed views of its rows. */
import { decodeBlock, type BlockArray, type Numbers } from "./block";
import type { StepsHeader } from "./types";

export interface Steps extends StepsHeader {
  count: number;
  step: Numbers;
  n: Numbers;
  /** [row, name], row-major. Means where a row holds several steps. */
  mean: Numbers;
  min: Numbers;
  max: Numbers;
  tensors: Record<string, BlockArray>;
}

/** The rows in `bytes`. Throws BlockError for anything else. */
export function decodeSteps(bytes: ArrayBuffer): Steps {
  const { header, arrays } = decodeBlock(bytes);
  const { step, n, scalars, scalars_min, scalars_max, scalars_mean, ...tensors } = arrays;
  const none = new Float32Array(0);
  const mean = scalars?.data ?? scalars_mean?.data ?? none;
  return {
    ...(header as unknown as StepsHeader),
    count: step?.data.length ?? 0,
    step: step?.data ?? none,
    n: n?.data ?? none,
    mean,
    min: scalars_min?.data ?? mean,
    max: scalars_max?.data ?? mean,
    tensors,
  };
}
