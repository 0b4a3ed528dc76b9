/** One layer's expert counts over time, [row, expert], at one level of detail; live rows are folded in as in `Series`. */
import { bucketOf, firstSteps } from "./series";
import type { Steps } from "./steps";

export class LayerHistory {
  length = 0;
  lastStep: number;
  step: Float64Array = new Float64Array(256);
  n: Float64Array = new Float64Array(256);
  tokens: Float64Array;

  /** `row` is the layer's row in the tensors of whole blocks. */
  constructor(
    readonly row: number,
    readonly experts: number,
    public level = 1,
    after = 0,
  ) {
    this.lastStep = after;
    this.tokens = new Float64Array(256 * experts);
  }

  /** Takes in new rows of a block that holds either every layer or this one only. */
  apply(rows: Steps): void {
    const counts = rows.tensors.expert_tokens;
    if (!counts || counts.shape[2] !== this.experts) return;
    const layers = counts.shape[1];
    const layer = layers === 1 ? 0 : this.row;
    for (let i = 0; i < rows.count; i++) {
      if (rows.step[i] <= this.lastStep) continue;
      this.lastStep = rows.step[i];
      const at = this.place(rows.step[i], rows.level);
      this.n[at] += rows.n[i] || 1;
      const from = (i * layers + layer) * this.experts;
      const to = at * this.experts;
      for (let e = 0; e < this.experts; e++) this.tokens[to + e] += counts.data[from + e];
    }
  }

  /** Makes this history `factor` times coarser in place. */
  coarsen(factor: number): void {
    const coarse = new LayerHistory(this.row, this.experts, this.level * factor);
    for (let i = 0; i < this.length; i++) {
      const at = coarse.place(this.step[i], this.level);
      coarse.n[at] += this.n[i];
      for (let e = 0; e < this.experts; e++) coarse.tokens[at * this.experts + e] += this.tokens[i * this.experts + e];
    }
    Object.assign(this, { step: coarse.step, n: coarse.n, tokens: coarse.tokens, length: coarse.length, level: coarse.level });
  }

  /** Expert `e`'s share of each row's assignments, times the number of experts: 1 is its fair share. */
  ratios(e: number): Float64Array {
    const out = new Float64Array(this.length);
    for (let i = 0; i < this.length; i++) {
      let sum = 0;
      for (let k = 0; k < this.experts; k++) sum += this.tokens[i * this.experts + k];
      out[i] = sum ? (this.tokens[i * this.experts + e] * this.experts) / sum : NaN;
    }
    return out;
  }

  private place(step: number, level: number): number {
    const last = this.length - 1;
    const shared = last >= 0 && this.level > level && bucketOf(this.step[last], this.level) === bucketOf(step, this.level);
    const at = shared ? last : this.push();
    this.step[at] = step;
    return at;
  }

  private push(): number {
    if (this.length === this.step.length) this.grow(this.length * 2);
    return this.length++;
  }

  private grow(capacity: number): void {
    const copy = (old: Float64Array, size: number) => {
      const array = new Float64Array(size);
      array.set(old);
      return array;
    };
    this.step = copy(this.step, capacity);
    this.n = copy(this.n, capacity);
    this.tokens = copy(this.tokens, capacity * this.experts);
  }
}

export interface Bins {
  /** × fair share: [expert, bin], NaN where empty. */
  ratios: Float32Array;
  columns: number;
  /** The first and the last step of each bin. */
  firsts: Float64Array;
  steps: Float64Array;
}

/** Sums of `history`'s rows within `from` … `to` in at most `columns` bins. */
export function binRatios(history: LayerHistory, from: number, to: number, columns: number): Bins {
  let first = 0;
  while (first < history.length && history.step[first] < from) first++;
  let end = history.length;
  while (end > first && history.step[end - 1] - Math.max(history.level - 1, 0) > to) end--;
  const rows = end - first;
  const bins = Math.max(Math.min(rows, columns), 0);
  const { experts, tokens } = history;
  const ratios = new Float32Array(experts * bins);
  const [firsts, steps] = [new Float64Array(bins), new Float64Array(bins)];
  const starts = firstSteps(history) ?? history.step;
  const sums = new Float64Array(experts);
  for (let bin = 0; bin < bins; bin++) {
    const start = first + Math.floor((bin * rows) / bins);
    const stop = first + Math.floor(((bin + 1) * rows) / bins);
    sums.fill(0);
    for (let i = start; i < stop; i++) for (let e = 0; e < experts; e++) sums[e] += tokens[i * experts + e];
    let total = 0;
    for (let e = 0; e < experts; e++) total += sums[e];
    for (let e = 0; e < experts; e++) ratios[e * bins + bin] = total ? (sums[e] * experts) / total : NaN;
    firsts[bin] = starts[start];
    steps[bin] = history.step[stop - 1];
  }
  return { ratios, columns: bins, firsts, steps };
}
