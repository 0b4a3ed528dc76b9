/** Whole routing rows (every layer) by step: chunks fetched around the cursor, and the live tail. Old cells are let go. */
import type { Numbers } from "./block";
import type { Steps } from "./steps";

/** The router's tensors at one step; each is [layer, expert] except where its name says otherwise. */
export interface Snapshot {
  step: number;
  layers: number;
  experts: number;
  tensors: Record<string, Numbers>;
}

interface Chunk {
  from: number;
  to: number;
  rows: Snapshot[];
}

const MAX_CELLS = 6_000_000;

export function snapshotsOf(rows: Steps): Snapshot[] {
  const counts = rows.tensors.expert_tokens;
  if (!counts) return [];
  const [, layers, experts] = counts.shape;
  return Array.from({ length: rows.count }, (_, i) => {
    const tensors: Record<string, Numbers> = {};
    for (const [name, { shape, data }] of Object.entries(rows.tensors)) {
      const size = shape.slice(1).reduce((product, n) => product * n, 1);
      tensors[name] = data.subarray(i * size, (i + 1) * size);
    }
    return { step: rows.step[i], layers, experts, tensors };
  });
}

export class Snapshots {
  private chunks: Chunk[] = [];
  private tail: Chunk | null = null;

  constructor(private readonly maxCells = MAX_CELLS) {}

  /** Rows that were fetched for the steps `from` … `to`. */
  add(from: number, to: number, rows: Snapshot[]): void {
    this.chunks.push({ from, to, rows });
    this.trim();
  }

  /** Rows that have just arrived, in order. */
  append(rows: Snapshot[]): void {
    if (!rows.length) return;
    this.tail ??= { from: rows[0].step, to: 0, rows: [] };
    for (const row of rows) {
      if (row.step <= this.tail.to) continue;
      this.tail.rows.push(row);
      this.tail.to = row.step;
    }
    this.trim();
  }

  /** The row of the last reported step up to `step` (or the first after it), if the steps around it are here. */
  at(step: number): Snapshot | undefined {
    const chunk = [this.tail, ...this.chunks].find((held) => held && held.from <= step && step <= held.to);
    if (!chunk) return undefined;
    let found = chunk.rows[0];
    for (const row of chunk.rows) if (row.step <= step) found = row;
    return found;
  }

  clear(): void {
    this.chunks = [];
    this.tail = null;
  }

  private trim(): void {
    const cells = (chunk: Chunk | null) => (chunk?.rows.length ?? 0) * (chunk?.rows[0] ? chunk.rows[0].layers * chunk.rows[0].experts : 0);
    const tail = this.tail;
    if (tail && cells(tail) > this.maxCells / 2) {
      tail.rows = tail.rows.slice(Math.ceil(tail.rows.length / 4));
      tail.from = tail.rows[0].step;
    }
    let sum = cells(tail) + this.chunks.reduce((total, chunk) => total + cells(chunk), 0);
    while (sum > this.maxCells && this.chunks.length > 1) sum -= cells(this.chunks.shift()!);
  }
}

/** How many steps to fetch around the cursor: few for large layers, many for small ones. */
export const chunkSteps = (layers: number, experts: number): number => Math.min(Math.max(Math.floor(200_000 / Math.max(layers * experts, 1)), 1), 200);
