/** Shares of the load: what every routing picture is drawn from. */
import type { Numbers } from "./block";

/** × fair share of each cell of [layer, expert] counts: 1 is an even split, NaN a layer without tokens. */
export function fairRatios(tokens: Numbers, layers: number, experts: number, out = new Float32Array(layers * experts)): Float32Array {
  for (let l = 0; l < layers; l++) {
    let sum = 0;
    for (let e = 0; e < experts; e++) sum += tokens[l * experts + e];
    const scale = sum ? experts / sum : NaN;
    for (let e = 0; e < experts; e++) out[l * experts + e] = tokens[l * experts + e] * scale;
  }
  return out;
}

/** (max load - mean load) / mean load of one layer's ratios (Wang 2024). */
export function maxVio(ratios: Float32Array): number {
  let max = -Infinity;
  for (const ratio of ratios) if (ratio > max) max = ratio;
  return max - 1;
}

/** Experts without a token. */
export function deadCount(ratios: Float32Array): number {
  let dead = 0;
  for (const ratio of ratios) if (ratio === 0) dead++;
  return dead;
}
