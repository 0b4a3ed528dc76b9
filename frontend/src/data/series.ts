/** Scalars of one run at one level of detail, in growing typed columns: history and live rows go through `apply`. */
import type { Steps } from "./steps";

export interface Column {
  mean: Float64Array;
  min: Float64Array;
  max: Float64Array;
}

/** The bucket of `step` at `level`, as in the store: bucket b holds steps b*level+1 … (b+1)*level. */
export const bucketOf = (step: number, level: number): number => Math.floor((step - 1) / level);

/** The first step that each row stands for; null where each stands for one. `n`: steps in it. */
export function firstSteps({ level, length, step, n }: { level: number; length: number; step: Float64Array; n: Float64Array }): Float64Array | null {
  if (level === 1) return null;
  return step.slice(0, length).map((last, row) => (n[row] > 1 ? bucketOf(last, level) * level + 1 : last));
}

/** Index of the last of the first `length` of ascending `steps` that is at most `step`, or -1. */
export function lastUpTo(steps: Float64Array, length: number, step: number): number {
  let low = 0;
  let high = length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** Index of the last of ascending `steps` that is at most `step`, or 0. */
export const rowAt = (steps: Float64Array, step: number): number => Math.max(lastUpTo(steps, steps.length, step), 0);

const nextCapacity = (size: number): number => 1 << (32 - Math.clz32(Math.max(size, 256) - 1));

function grown(old: Float64Array, capacity: number): Float64Array {
  const array = new Float64Array(capacity);
  array.set(old);
  return array;
}

export class Series {
  length = 0;
  /** The last step that was taken in; rows up to it are ignored, so that no step counts twice. */
  lastStep: number;
  step: Float64Array = new Float64Array(256);
  n: Float64Array = new Float64Array(256);
  readonly columns = new Map<string, Column>();

  constructor(
    public level = 1,
    after = 0,
  ) {
    this.lastStep = after;
  }

  /** Takes in the rows that are new, at this level or finer. Returns how many rows of `rows` were new. */
  apply(rows: Steps): number {
    for (const name of rows.names) if (!this.columns.has(name)) this.columns.set(name, this.column());
    let fresh = 0;
    for (let row = 0; row < rows.count; row++) {
      if (rows.step[row] <= this.lastStep) continue;
      const at = this.place(rows.step[row], rows.n[row] || 1, rows.level);
      this.fold(rows, row, at);
      this.lastStep = rows.step[row];
      fresh++;
    }
    return fresh;
  }

  /** Makes this series `factor` times coarser in place. */
  coarsen(factor: number): void {
    const coarse = new Series(this.level * factor);
    for (const name of this.columns.keys()) coarse.columns.set(name, coarse.column());
    for (let row = 0; row < this.length; row++) {
      const at = coarse.place(this.step[row], this.n[row], this.level);
      for (const [name, column] of this.columns) merge(coarse.columns.get(name)!, at, column.mean[row], column.min[row], column.max[row], this.n[row], coarse.n[at]);
    }
    Object.assign(this, { step: coarse.step, n: coarse.n, length: coarse.length, level: coarse.level });
    for (const [name, column] of coarse.columns) this.columns.set(name, column);
  }

  /** Views of one column for drawing; NaN rows stay NaN. Undefined for a name that was never seen. */
  view(name: string): Column | undefined {
    const column = this.columns.get(name);
    const cut = (array: Float64Array) => array.subarray(0, this.length);
    return column && { mean: cut(column.mean), min: cut(column.min), max: cut(column.max) };
  }

  /** Index of the last row whose step is at most `step`, or -1. */
  rowAt(step: number): number {
    return lastUpTo(this.step, this.length, step);
  }

  private column(): Column {
    const empty = () => new Float64Array(this.step.length).fill(NaN);
    return { mean: empty(), min: empty(), max: empty() };
  }

  /** The row that `step` belongs to: the last one if it shares its bucket, else a new one. Counts its `n` steps in. */
  private place(step: number, n: number, level: number): number {
    const last = this.length - 1;
    const shared = last >= 0 && this.level > level && bucketOf(this.step[last], this.level) === bucketOf(step, this.level);
    const at = shared ? last : this.push();
    this.step[at] = step;
    this.n[at] += n;
    return at;
  }

  private push(): number {
    if (this.length === this.step.length) this.grow(nextCapacity(this.length + 1));
    const at = this.length++;
    this.n[at] = 0;
    for (const column of this.columns.values()) column.mean[at] = column.min[at] = column.max[at] = NaN;
    return at;
  }

  private grow(capacity: number): void {
    this.step = grown(this.step, capacity);
    this.n = grown(this.n, capacity);
    for (const column of this.columns.values()) {
      column.mean = grown(column.mean, capacity);
      column.min = grown(column.min, capacity);
      column.max = grown(column.max, capacity);
    }
  }

  private fold(rows: Steps, row: number, at: number): void {
    const width = rows.names.length;
    for (let i = 0; i < width; i++) {
      const cell = row * width + i;
      merge(this.columns.get(rows.names[i])!, at, rows.mean[cell], rows.min[cell], rows.max[cell], rows.n[row] || 1, this.n[at]);
    }
  }
}

/** Takes `n` more steps into row `at`, which then holds `total` steps. Unknown (NaN) values change nothing. */
function merge(column: Column, at: number, mean: number, min: number, max: number, n: number, total: number): void {
  if (Number.isNaN(mean)) return;
  const had = column.mean[at];
  if (Number.isNaN(had)) {
    column.mean[at] = mean;
    column.min[at] = min;
    column.max[at] = max;
    return;
  }
  column.mean[at] = had + (mean - had) * (n / total);
  column.min[at] = Math.min(column.min[at], min);
  column.max[at] = Math.max(column.max[at], max);
}
