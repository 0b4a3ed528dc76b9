/** Exponential moving average with the bias of its start taken out; unknown values are passed over. */
export function ema(values: Float64Array, weight: number): Float64Array {
  const out = new Float64Array(values.length);
  let sum = 0;
  let mass = 0;
  for (let i = 0; i < values.length; i++) {
    if (!Number.isNaN(values[i])) {
      sum = sum * weight + values[i] * (1 - weight);
      mass = mass * weight + (1 - weight);
    }
    out[i] = mass ? sum / mass : NaN;
  }
  return out;
}
