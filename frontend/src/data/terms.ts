/** One layer's balancing terms over time, without their weights: the rows of a tensor as rows of scalars, which a Series takes in. */
import type { Steps } from "./steps";

/** The values of `terms` in the layer of that `row`, as scalars of their names; null where the block has none. It may hold every layer or this one only. */
export function termRows(rows: Steps, row: number, terms: string[]): Steps | null {
  const tensor = rows.tensors.balance_loss;
  if (!tensor || tensor.shape[2] !== terms.length) return null;
  const [, layers, width] = tensor.shape;
  const layer = layers === 1 ? 0 : row;
  const values = new Float32Array(rows.count * width);
  for (let i = 0; i < rows.count; i++) {
    const from = (i * layers + layer) * width;
    values.set(tensor.data.subarray(from, from + width), i * width);
  }
  return { ...rows, names: terms, mean: values, min: values, max: values };
}
