/** The parts that sampled steps were told into, by step; the newest few hundred are kept. */
import type { Numbers } from "./block";
import type { Steps } from "./steps";

/** `partMs` is [rank, part, pass] in milliseconds, `sentBytes` [rank]. */
export interface Sample {
  step: number;
  ranks: number;
  partMs: Numbers;
  sentBytes: Numbers | null;
}

const MAX_SAMPLES = 500;

export class Samples {
  private readonly held = new Map<number, Sample | null>();

  /** `every`: steps between samples; 0 for never, null where nobody knows. */
  constructor(readonly every: number | null) {}

  /** The step to fetch a sample of, to have one for `step`; 0 where there is none or it is here. */
  missing(step: number): number {
    const due = this.every ? Math.floor(step / this.every) * this.every : 0;
    return due && !this.held.has(due) ? due : 0;
  }

  /** The last sample up to `step`. */
  at(step: number): Sample | null {
    let found: Sample | null = null;
    for (const sample of this.held.values()) if (sample && sample.step <= step && (!found || sample.step > found.step)) found = sample;
    return found && this.every && step - found.step >= this.every ? null : found;
  }

  /** Takes in what rows of single steps say; with `asked`, that this step was asked for, whatever came. */
  take(rows: Steps, asked = 0): void {
    if (asked) this.held.set(asked, null);
    const parts = rows.tensors.part_ms;
    if (rows.level !== 1 || !parts) return;
    const [, ranks, names, passes] = parts.shape;
    const size = ranks * names * passes;
    const { part_ms_n: had, sent_bytes: sent, sent_bytes_n: counted } = rows.tensors;
    for (let i = 0; i < rows.count; i++) {
      if (had && !had.data[i]) continue;
      const sentBytes = sent && (!counted || counted.data[i]) ? sent.data.slice(i * ranks, (i + 1) * ranks) : null;
      this.held.set(rows.step[i], { step: rows.step[i], ranks, partMs: parts.data.slice(i * size, (i + 1) * size), sentBytes });
    }
    for (const step of this.held.keys()) if (this.held.size > MAX_SAMPLES) this.held.delete(step);
  }

  clear(): void {
    this.held.clear();
  }
}
