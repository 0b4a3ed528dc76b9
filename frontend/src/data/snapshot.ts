/** Whole routing rows (every layer) by step: chunks fetched around the cursor, and the live tail. Old cells are let go. */
import type { Numbers } from "./block";
import type { Steps } from "./steps";

/** What was told at one step; tensors are [layer, expert] except where their name says otherwise. One that was not told is not there. */
export interface Snapshot {
  step: number;
  layers: number;
  experts: number;
  tensors: Record<string, Numbers | undefined>;
}

interface Chunk {
  from: number;
  to: number;
  rows: Snapshot[];
  cells: number;
}

const MAX_CELLS = 6_000_000;
/** What a row costs beside its numbers, in numbers. */
const ROW_CELLS = 32;

export function snapshotsOf(rows: Steps): Snapshot[] {
  const [, layers, experts] = rows.tensors.expert_tokens?.shape ?? [0, rows.moe_layers.length, rows.n_experts];
  const told = Object.entries(rows.tensors).filter(([name]) => !name.endsWith("_n"));
  return Array.from({ length: rows.count }, (_, i) => {
    const tensors: Snapshot["tensors"] = {};
    for (const [name, { shape, data }] of told) {
      const had = rows.tensors[`${name}_n`];
      if (had && !had.data[i]) continue;
      const size = shape.slice(1).reduce((product, n) => product * n, 1);
      tensors[name] = data.subarray(i * size, (i + 1) * size);
    }
    return { step: rows.step[i], layers, experts, tensors };
  });
}

const cellsOf = (rows: Snapshot[]): number => rows.reduce((sum, { tensors }) => Object.values(tensors).reduce((all, values) => all + values!.length, sum), ROW_CELLS * rows.length);

export class Snapshots {
  private chunks: Chunk[] = [];
  private tail: Chunk | null = null;

  constructor(private readonly maxCells = MAX_CELLS) {}

  /** Rows that were fetched for the steps `from` … `to`. */
  add(from: number, to: number, rows: Snapshot[]): void {
    this.chunks.push({ from, to, rows, cells: cellsOf(rows) });
    this.trim();
  }

  /** Rows that have just arrived, in order: all that there are from the step `from` on. */
  append(rows: Snapshot[], from = rows[0]?.step): void {
    if (!rows.length) return;
    if (this.tail && from > this.tail.to + 1) {
      this.chunks.push(this.tail);
      this.tail = null;
    }
    // What was told last before steps that nothing leads to is not here: they are left to be fetched.
    const joined = from <= 1 || this.holds(from - 1);
    this.tail ??= { from: joined ? from : rows[0].step, to: 0, rows: [], cells: 0 };
    for (const row of rows) {
      if (row.step <= this.tail.to) continue;
      this.tail.rows.push(row);
      this.tail.to = row.step;
      this.tail.cells += cellsOf([row]);
    }
    this.trim();
  }

  /** The row of the last reported step up to `step` (or the first after it), if the steps around it are here. */
  at(step: number): Snapshot | undefined {
    return this.last(step, () => true) ?? this.covering(step)?.rows[0];
  }

  /** The last row up to `step` that told the tensor `name`, among those that are here without a gap; else what `at` gives, if it did. */
  told(step: number, name: string): Snapshot | undefined {
    const row = this.last(step, ({ tensors }) => Boolean(tensors[name])) ?? this.at(step);
    return row?.tensors[name] ? row : undefined;
  }

  /** The last row up to `step` that is as wanted, through chunks that follow each other without a gap. */
  private last(step: number, wanted: (row: Snapshot) => boolean): Snapshot | undefined {
    let to = step;
    for (let chunk = this.covering(to); chunk; chunk = this.covering(to)) {
      const found = chunk.rows.findLast((row) => row.step <= to && wanted(row));
      if (found) return found;
      to = chunk.from - 1;
    }
    return undefined;
  }

  /** Whether the steps around `step` are here, be there rows among them or not. */
  holds(step: number): boolean {
    return this.covering(step) !== undefined;
  }

  /** The last `n` rows up to `step`, or fewer: those that are here without a gap. */
  upTo(step: number, n: number): Snapshot[] {
    const found: Snapshot[] = [];
    let to = step;
    for (let chunk = this.covering(to); chunk && found.length < n; chunk = this.covering(to)) {
      found.unshift(...chunk.rows.filter((row) => row.step <= to).slice(-n));
      to = chunk.from - 1;
    }
    return found.slice(-n);
  }

  private covering(step: number): Chunk | undefined {
    return [this.tail, ...this.chunks].find((held) => held && held.from <= step && step <= held.to) ?? undefined;
  }

  clear(): void {
    this.chunks = [];
    this.tail = null;
  }

  private trim(): void {
    const tail = this.tail;
    if (tail && tail.rows.length > 1 && tail.cells > this.maxCells / 2) {
      tail.rows = tail.rows.slice(Math.ceil(tail.rows.length / 4));
      tail.from = tail.rows[0].step;
      tail.cells = cellsOf(tail.rows);
    }
    let sum = (tail?.cells ?? 0) + this.chunks.reduce((total, chunk) => total + chunk.cells, 0);
    while (sum > this.maxCells && this.chunks.length > 1) sum -= this.chunks.shift()!.cells;
  }
}

/** How many steps to fetch around the cursor: few for large layers, many for small ones. `ranks` share the experts, and one alone sends nothing. */
export function chunkSteps(layers: number, experts: number, ranks: number): number {
  const cells = layers * (experts + (ranks > 1 ? ranks ** 2 : 0));
  return Math.min(Math.max(Math.floor(200_000 / Math.max(cells, 1)), 1), 200);
}
