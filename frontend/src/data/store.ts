/** The state of the run page. Everything that arrives, from history or live, goes through `apply*`; views listen by topic. */
import { LayerHistory } from "./layer";
import { Samples } from "./samples";
import { Series } from "./series";
import { Snapshots, snapshotsOf } from "./snapshot";
import type { Steps } from "./steps";
import { termRows } from "./terms";
import type { LiveMessage, Run, RunEvent } from "./types";

export type Topic = "run" | "steps" | "cursor" | "range" | "layer" | "expert" | "snapshot" | "events" | "log" | "reload" | "failure";

/** What is fetched apart: where one fails, the others stand. */
export type Fetched = "whole" | "zoom" | "layer" | "terms" | "snapshot" | "sample" | "events";

export interface Range {
  from: number;
  to: number;
}

/** A series longer than this is made coarser: more rows than pixels bring nothing. */
const MAX_ROWS = 10_000;
const MAX_LAYER_CELLS = 4_000_000;

export class RunStore {
  whole = new Series();
  zoomed: Series | null = null;
  /** The steps that the charts show; null means all. */
  range: Range | null = null;
  readonly snapshots = new Snapshots();
  layerWhole: LayerHistory | null = null;
  layerZoomed: LayerHistory | null = null;
  /** The chosen layer's balancing terms over the whole run. */
  terms: Series | null = null;
  /** Row of the chosen layer in the tensors, and the chosen expert. */
  layer = 0;
  expert: number | null = null;
  step = 0;
  follow = true;
  events: RunEvent[] = [];
  private readonly eventIds = new Set<number>();
  private readonly listeners = new Map<Topic, Set<() => void>>();
  readonly logListeners = new Set<(offset: number, text: string) => void>();

  /** The parts that sampled steps were told into, `sampleEvery` steps apart. */
  readonly samples: Samples;

  /** Why the newest try to fetch something failed. */
  readonly failures = new Map<Fetched, string>();

  /** `expertRanks`: how many ranks share the experts. `every`: steps between those that are told, null where nobody knows. */
  constructor(
    public run: Run,
    sampleEvery: number | null = null,
    readonly expertRanks = 1,
    readonly every: number | null = null,
  ) {
    this.samples = new Samples(sampleEvery);
  }

  on(topics: Topic | Topic[], listener: () => void): void {
    for (const topic of [topics].flat()) {
      if (!this.listeners.has(topic)) this.listeners.set(topic, new Set());
      this.listeners.get(topic)!.add(listener);
    }
  }

  emit(...topics: Topic[]): void {
    const heard = new Set(topics.flatMap((topic) => [...(this.listeners.get(topic) ?? [])]));
    for (const listener of heard) listener();
  }

  get series(): Series {
    return this.zoomed ?? this.whole;
  }

  /** The series that has the chosen step: a zoom need not. */
  get seriesAtStep(): Series {
    const { from, to } = this.shown;
    return this.step >= from && this.step <= to ? this.series : this.whole;
  }

  get layerHistory(): LayerHistory | null {
    return this.layerZoomed ?? this.layerWhole;
  }

  get lastStep(): number {
    return this.whole.lastStep;
  }

  /** The steps that are shown, with the ends filled in. */
  get shown(): Range {
    return this.range ?? { from: 1, to: Math.max(this.lastStep, 1) };
  }

  /** Takes in a text frame of the live socket. */
  applyMessage(message: LiveMessage): void {
    if (message.type === "hello" || message.type === "run") this.applyRun(message.run);
    else if (message.type === "event") this.applyEvents([message.event]);
    else if (message.type === "log") for (const listener of this.logListeners) listener(message.offset, message.text);
  }

  applyRun(run: Run): void {
    const before = this.run;
    this.run = { ...before, ...run };
    this.emit("run");
    const rewound = run.attempt !== before.attempt || run.resumed_from_step !== before.resumed_from_step;
    if (rewound && this.lastStep > (run.resumed_from_step ?? 0)) this.emit("reload");
  }

  /** Takes in rows in order, from history or live: rows that are already here change nothing. */
  applySteps(rows: Steps, live = true): void {
    const known = this.whole.columns.size;
    if (!this.whole.apply(rows)) return;
    if (live) {
      this.layerWhole?.apply(rows);
      const terms = this.terms && termRows(rows, this.layer, this.run.balance_terms ?? []);
      if (terms) this.terms!.apply(terms);
      if (rows.level === 1) this.snapshots.append(snapshotsOf(rows), rows.from);
      this.samples.take(rows);
    }
    this.limit();
    if (this.follow) this.step = this.lastStep;
    this.emit("steps", ...(this.follow ? (["cursor"] as const) : []), ...(known === 0 ? (["run"] as const) : []));
  }

  applyEvents(events: RunEvent[]): void {
    const before = this.events.length;
    for (const event of events) {
      if (this.eventIds.has(event.id)) continue;
      this.eventIds.add(event.id);
      this.events.push(event);
    }
    if (this.events.length === before) return;
    this.events.sort((a, b) => a.id - b.id);
    this.emit("events");
  }

  /** Says that fetching `what` has failed, and why; undefined: it has not. */
  fail(what: Fetched, why?: string): void {
    if (this.failures.get(what) === why) return;
    if (why === undefined) this.failures.delete(what);
    else this.failures.set(what, why);
    this.emit("failure");
  }

  setStep(step: number, follow = false): void {
    this.follow = follow;
    this.step = Math.min(Math.max(Math.round(step), 1), Math.max(this.lastStep, 1));
    this.emit("cursor");
  }

  setRange(range: Range | null): void {
    this.range = range;
    this.zoomed = null;
    this.layerZoomed = null;
    this.emit("range");
  }

  setLayer(layer: number): void {
    if (layer === this.layer && this.layerWhole) return;
    this.layer = layer;
    this.layerWhole = this.layerZoomed = null;
    this.terms = null;
    this.emit("layer");
  }

  setExpert(expert: number | null): void {
    this.expert = expert;
    this.emit("expert");
  }

  /** Forgets all rows, before they are fetched again. */
  clear(): void {
    this.whole = new Series();
    this.zoomed = null;
    this.layerWhole = this.layerZoomed = null;
    this.terms = null;
    this.snapshots.clear();
    this.samples.clear();
  }

  private limit(): void {
    const factor = (level: number) => (level === 1 ? 64 : 16);
    if (this.whole.length > MAX_ROWS) this.whole.coarsen(factor(this.whole.level));
    if (this.terms && this.terms.length > MAX_ROWS) this.terms.coarsen(factor(this.terms.level));
    const layer = this.layerWhole;
    if (layer && (layer.length > MAX_ROWS || layer.length * layer.experts > MAX_LAYER_CELLS)) layer.coarsen(factor(layer.level));
  }
}
